//! What is done by schedule, as the listeners ask for it and as the work needs it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use pgsidecar_core::schedule::{Schedule, Task};

use super::App;
use crate::{
    failure::Failure,
    schedule::{ScheduleStatus, Scheduler},
    settings::WorkSettings,
};

impl App {
    /// When work is done by itself, and how it went.
    ///
    /// # Errors
    /// Wrong settings.
    pub fn schedule(&self) -> Result<Vec<ScheduleStatus>, Failure> {
        Ok(self.scheduler.status(&self.work()?.settings.schedules, Timestamp::now()))
    }

    pub(super) fn schedule_status(&self) -> Vec<ScheduleStatus> {
        self.schedule().unwrap_or_default()
    }

    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    pub(crate) fn schedules(&self) -> Result<&BTreeMap<Task, Schedule>, Failure> {
        Ok(&self.work()?.settings.schedules)
    }

    pub(crate) fn work_settings(&self) -> Result<&WorkSettings, Failure> {
        Ok(&self.work()?.settings)
    }
}
