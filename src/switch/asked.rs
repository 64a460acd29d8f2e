//! Restores in place as they are asked for, by a command or over the API, and what is done before PostgreSQL starts.

use std::{path::Path, sync::Arc};

use pgsidecar_core::{
    Layout, TimelineId,
    plan::RestoreRequest,
    recovery::{RecoveryMode, RecoveryTarget, RestoreOrder},
    switch::{Phase, Purpose, Switch},
};

use super::{already, carry_out, lay_out_data, new_id, note, places::Place, stage, wal};
use crate::{
    daemon::open_store,
    failure::{Code, Failure},
    pgdata::DataDirectory,
    progress::Progress,
    repository::Repository,
    restore::{self, RestoreOptions, command::restore_command, replace, running::server_on},
    settings::{ProcessSettings, Settings, WorkSettings},
};

/// The settings of whoever is asked.
#[derive(Clone, Copy)]
pub struct Asker<'a> {
    /// What the work needs.
    pub work: &'a WorkSettings,
    /// What the process needs.
    pub process: &'a ProcessSettings,
}

impl Asker<'_> {
    /// Prepares a restore in the place of the database that is there: plans it, and writes it beside, or, where it's to be
    /// restored over it, only notes it.
    ///
    /// # Errors
    /// As [`restore::plan`] and [`stage`].
    pub async fn prepare(
        &self,
        repository: &Repository,
        pgdata: &DataDirectory,
        order: &RestoreOrder,
        progress: Arc<Progress>,
    ) -> Result<Switch, Failure> {
        let plan = restore::plan(repository, order.request()?).await?;
        if order.replace {
            return note_replacement(repository, pgdata, &plan, order);
        }
        let options = self.options(repository, pgdata, order, plan.timeline)?;
        stage(repository, pgdata, &plan, &options, progress).await
    }

    fn options(
        &self,
        repository: &Repository,
        pgdata: &DataDirectory,
        order: &RestoreOrder,
        timeline: TimelineId,
    ) -> Result<RestoreOptions, Failure> {
        // The end of the WAL is in the old directory's own pg_wal, from which it's taken along, unless that server had left
        // the timeline. A tail in the repository may be older.
        let has_the_end = pgdata.control()?.timeline == timeline;
        let tail = order.request()?.target == RecoveryTarget::Latest && !has_the_end;
        let command = match &order.restore_command {
            Some(command) => command.clone(),
            None => restore_command(&self.work.helper, self.process.wal_listen, repository.layout().system(), tail)?,
        };
        Ok(RestoreOptions {
            to: pgdata.path().to_owned(),
            mode: RecoveryMode::default(),
            inclusive: !order.exclusive,
            action: order.action,
            tablespaces: order.tablespaces.clone(),
            restore_command: command,
            parallelism: self.work.parallelism,
        })
    }

    /// Restores over the database.
    async fn replace(&self, data: &Place, mut switch: Switch, progress: Arc<Progress>) -> Result<Switch, Failure> {
        let Purpose::Replace { system, backup, timeline, order } = switch.purpose.clone() else {
            return Err(Failure::internal("not a replacement"));
        };
        let layout = Layout::new(self.work.cluster.clone(), system);
        let repository = Repository::new(open_store(self.work).await, layout, self.work.compression_level);
        let request = RestoreRequest { backup: Some(backup), timeline: Some(timeline), ..order.request()? };
        let to_the_end = request.target == RecoveryTarget::Latest;
        let plan = restore::plan(&repository, request).await?;
        let failed = |error: std::io::Error| Failure::io(format!("reading {}", data.path.display()), &error);
        if let Some(server) = server_on(&data.path).map_err(failed)? {
            return Err(Failure::new(
                Code::TargetDirectory,
                format!("a server runs on {} ({server}); nothing was changed", data.path.display()),
            )
            .hint("Stop it first: in Kubernetes delete the pod, its successor restores before PostgreSQL starts."));
        }
        let kept =
            switch.kept_data().map(Path::to_owned).ok_or_else(|| Failure::internal("a replacement without a place"))?;
        if switch.phase == Phase::Ready {
            wal::save(&data.path, &kept)?;
            switch.phase = Phase::Switching;
            note::write_pending(data, &switch)?;
        }
        let kept_wal = if to_the_end { wal::saved(&kept, timeline)? } else { Vec::new() };
        let tail = to_the_end && kept_wal.is_empty();
        let command = match &order.restore_command {
            Some(command) => command.clone(),
            None => restore_command(&self.work.helper, self.process.wal_listen, system, tail)?,
        };
        let options = RestoreOptions {
            to: data.path.clone(),
            mode: RecoveryMode::default(),
            inclusive: !order.exclusive,
            action: order.action,
            tablespaces: order.tablespaces.clone(),
            restore_command: command,
            parallelism: self.work.parallelism,
        };
        replace::run(&repository, &plan, &options, &kept_wal, progress).await?;
        note::finish(data, &switch)?;
        Ok(switch)
    }
}

/// Nothing is written beside the database: that's done over it, when no server runs.
fn note_replacement(
    repository: &Repository,
    pgdata: &DataDirectory,
    plan: &pgsidecar_core::plan::RestorePlan,
    order: &RestoreOrder,
) -> Result<Switch, Failure> {
    let data = Place::of_data(pgdata.path())?;
    let _lock = note::lock(&data)?;
    if let Some(switch) = note::pending(&data)? {
        return Err(already(&switch));
    }
    let purpose = Purpose::Replace {
        system: repository.layout().system(),
        backup: plan.backup.id,
        timeline: plan.timeline,
        order: Box::new(order.clone()),
    };
    let id = new_id(&data)?;
    let roots = vec![lay_out_data(&data, id, &purpose)];
    let switch = Switch { id, purpose, phase: Phase::Ready, roots };
    note::write_pending(&data, &switch)?;
    Ok(switch)
}

/// What has to be done before PostgreSQL starts: a restore that was prepared takes its place, or one that was interrupted goes
/// on. `None` if there's nothing to be done.
///
/// # Errors
/// As [`carry_out`]: PostgreSQL must not be started then.
pub async fn before_start(
    settings: &Settings,
    pgdata: &Path,
    progress: Arc<Progress>,
) -> Result<Option<Switch>, Failure> {
    let path = pgdata.to_owned();
    let data = Place::of_data(&path)?;
    match note::pending(&data)? {
        Some(switch) if matches!(switch.purpose, Purpose::Replace { .. }) => {
            let _lock = note::lock(&data)?;
            let asker = Asker { work: settings.work()?, process: &settings.process };
            let begun = switch.phase == Phase::Switching;
            let done = asker.replace(&data, switch, progress).await;
            done.map(Some).map_err(|failure| if begun { failure.hint(format!("PostgreSQL doesn't start on {} until this has ended. Put right what is wrong and try again: it goes on.", path.display())) } else { failure })
        }
        _ => {
            let carried = tokio::task::spawn_blocking(move || {
                carry_out(&path, &mut |step| {
                    tracing::debug!(step, "switching");
                    Ok(())
                })
            });
            carried.await?
        }
    }
}
