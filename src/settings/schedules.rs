//! When work is done by itself.

use std::{collections::BTreeMap, time::Duration};

use clap::Args;
use jiff::tz::TimeZone;
use pgsidecar_core::{
    ClusterName,
    schedule::{CronExpression, Schedule, Task, parse_time_zone},
    settings::parse_duration,
};

use super::Resolver;

/// The longest jitter: a nightly run still is one.
const LONGEST_JITTER: Duration = Duration::from_secs(6 * 3600);

/// The schedules as they are written.
#[derive(Args, Clone, Debug, Default)]
pub struct RawSchedules {
    /// When the daemon takes a full backup: five fields as in cron, '0 2 * * 0' is Sunday at 2 [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_FULL",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_full: Option<String>,
    /// When it takes a differential backup [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_DIFFERENTIAL",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_differential: Option<String>,
    /// When it takes an incremental backup [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_INCREMENTAL",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_incremental: Option<String>,
    /// When it takes logical dumps [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_DUMP",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_dump: Option<String>,
    /// When it verifies the backups in the repository [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_VERIFY",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_verify: Option<String>,
    /// When it deletes what need not be kept any longer [default: never]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_PRUNE",
        value_name = "CRON",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_prune: Option<String>,
    /// The time zone whose clock the schedules go by, like Europe/Berlin [default: UTC]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_TIME_ZONE",
        value_name = "ZONE",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_time_zone: Option<String>,
    /// How long after its time a run begins at most, the same for each run of a cluster, up to 6h [default: 5min]
    #[arg(
        long,
        global = true,
        env = "PGSIDECAR_SCHEDULE_JITTER",
        value_name = "TIME",
        hide_env_values = true,
        hide_short_help = true
    )]
    pub schedule_jitter: Option<String>,
}

impl RawSchedules {
    /// The schedules of this cluster; none where its name is wrong.
    pub(super) fn resolve(&self, resolver: &mut Resolver, cluster: Option<&ClusterName>) -> BTreeMap<Task, Schedule> {
        let zone = resolver.value(
            "PGSIDECAR_SCHEDULE_TIME_ZONE",
            self.schedule_time_zone.as_ref(),
            TimeZone::UTC,
            parse_time_zone,
        );
        let default = Duration::from_secs(300);
        let jitter = resolver.value("PGSIDECAR_SCHEDULE_JITTER", self.schedule_jitter.as_ref(), default, |text| {
            match parse_duration(text) {
                Ok(jitter) if jitter <= LONGEST_JITTER => Ok(jitter),
                Ok(_) => Err(format!("{text:?} is longer than 6h")),
                Err(problem) => Err(problem.to_string()),
            }
        });
        let raw = [
            (Task::Full, "PGSIDECAR_SCHEDULE_FULL", &self.schedule_full),
            (Task::Differential, "PGSIDECAR_SCHEDULE_DIFFERENTIAL", &self.schedule_differential),
            (Task::Incremental, "PGSIDECAR_SCHEDULE_INCREMENTAL", &self.schedule_incremental),
            (Task::Dump, "PGSIDECAR_SCHEDULE_DUMP", &self.schedule_dump),
            (Task::Verify, "PGSIDECAR_SCHEDULE_VERIFY", &self.schedule_verify),
            (Task::Prune, "PGSIDECAR_SCHEDULE_PRUNE", &self.schedule_prune),
        ];
        let parsed = raw.map(|(task, name, text)| {
            let cron = resolver.value(name, text.as_ref(), None, |text| text.parse::<CronExpression>().map(Some));
            (task, cron)
        });
        let schedules = parsed
            .into_iter()
            .filter_map(|(task, cron)| Some((task, Schedule::new(cron?, zone.clone(), jitter, cluster?.as_str()))));
        schedules.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_wrong_is_told_at_once_and_no_schedule_is_the_default() {
        let text = |text: &str| Some(text.to_owned());
        let wrong = RawSchedules {
            schedule_full: text("0 2 * *"),
            schedule_verify: text("0 2 30 2 *"),
            schedule_time_zone: text("Berlin"),
            schedule_jitter: text("7h"),
            schedule_prune: text("0 4 * * *"),
            ..RawSchedules::default()
        };
        let cluster: ClusterName = "main".parse().unwrap();
        let resolve = |raw: &RawSchedules| {
            let mut resolver = Resolver(Vec::new());
            let schedules = raw.resolve(&mut resolver, Some(&cluster));
            (schedules, resolver.0)
        };
        let (_, errors) = resolve(&wrong);
        let names: Vec<&str> = errors.iter().map(|error| error.name).collect();
        assert_eq!(
            names,
            [
                "PGSIDECAR_SCHEDULE_TIME_ZONE",
                "PGSIDECAR_SCHEDULE_JITTER",
                "PGSIDECAR_SCHEDULE_FULL",
                "PGSIDECAR_SCHEDULE_VERIFY"
            ]
        );
        assert_eq!(resolve(&RawSchedules::default()).0.len(), 0);
        let right = RawSchedules {
            schedule_full: text("30 2 * * sun"),
            schedule_time_zone: text("europe/berlin"),
            ..RawSchedules::default()
        };
        let (schedules, errors) = resolve(&right);
        assert_eq!(errors, []);
        assert_eq!(schedules[&Task::Full].to_string(), "30 2 * * sun Europe/Berlin");
    }
}
