//! Restores in place as they are asked for, by a command or over the API, and what is done before PostgreSQL starts.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use pgsidecar_core::{
    Layout, SegmentName, TimelineId,
    plan::{RestorePlan, RestoreRequest},
    recovery::{RecoveryMode, RecoveryTarget, RestoreOrder},
    switch::{Phase, Purpose, Role, Root, Switch, Way},
};

use super::{
    already, carry_out, has_begun, new_id, note,
    places::{Place, inode, lay_out_data, live_tablespaces, tablespace_links, version_directory},
    settled, stage, wal,
};
use crate::{
    daemon::open_store,
    failure::{Code, Failure},
    pgdata::DataDirectory,
    progress::Progress,
    repository::Repository,
    restore::{
        self, RestoreOptions,
        command::restore_command,
        replace::{self, Replaced},
        running::{Stopped, refuse_if_running},
    },
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
    /// As [`restore::plan`] and [`stage`]; [`Code::TargetDirectory`] on a standby.
    pub async fn prepare(
        &self,
        repository: &Repository,
        pgdata: &Path,
        order: &RestoreOrder,
        progress: Arc<Progress>,
    ) -> Result<Switch, Failure> {
        if pgdata.join("standby.signal").exists() {
            return Err(Failure::new(
                Code::TargetDirectory,
                format!(
                    "{} is a standby's: what it follows would not be restored; nothing was changed",
                    pgdata.display()
                ),
            )
            .hint("Restore the primary in its place, and make the standbys anew."));
        }
        let plan = restore::plan(repository, order.request()?).await?;
        if order.replace {
            return self.note_replacement(repository, pgdata, &plan, order).await;
        }
        let pgdata = DataDirectory::open(pgdata)?;
        let options = self.options(repository, &pgdata, order, plan.timeline)?;
        stage(repository, &pgdata, &plan, &options, progress).await
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
        // What can't be read has none that could be taken along.
        let has_the_end = pgdata.control().is_ok_and(|control| control.newest_timeline() == timeline);
        let tail = order.request()?.target == RecoveryTarget::Latest && !has_the_end;
        let command = match &order.restore_command {
            Some(command) => command.clone(),
            None => restore_command(&self.work.helper, self.process.wal_listen, repository.layout().system(), tail)?,
        };
        Ok(self.options_with(pgdata.path(), order, command))
    }

    fn options_with(&self, to: &Path, order: &RestoreOrder, restore_command: String) -> RestoreOptions {
        RestoreOptions {
            to: to.to_owned(),
            mode: RecoveryMode::default(),
            inclusive: !order.exclusive,
            action: order.action,
            tablespaces: order.tablespaces.clone(),
            restore_command,
            parallelism: self.work.parallelism,
        }
    }

    /// Notes that the database is to be restored over, which is done when no server runs. One that is stuck in the middle,
    /// because its backup turned out to be damaged, is taken over by this one.
    async fn note_replacement(
        &self,
        repository: &Repository,
        pgdata: &Path,
        plan: &RestorePlan,
        order: &RestoreOrder,
    ) -> Result<Switch, Failure> {
        let data = Place::of_data(pgdata)?;
        let _lock = note::lock(&data)?;
        let stuck = match settled(&data)? {
            Some(switch) if is_replacement(&switch) && switch.phase == Phase::Switching => Some(switch),
            Some(switch) => return Err(already(&switch)),
            None => None,
        };
        replace::check(repository, plan, &self.options_with(&data.path, order, String::new())).await?;
        let purpose = Purpose::Replace {
            system: repository.layout().system(),
            backup: plan.backup.id,
            timeline: plan.timeline,
            order: Box::new(order.clone()),
        };
        let switch = match stuck {
            // What it has kept, and which tablespaces there were, stays noted.
            Some(stuck) => {
                Switch { purpose, roots: with_tablespaces_of(plan, order, stuck.roots, &data)?, refused: None, ..stuck }
            }
            None => {
                replaced_tablespaces(&data.path)?;
                let id = new_id(&data)?;
                let roots = vec![lay_out_data(&data, id, &purpose)];
                Switch { id, purpose, phase: Phase::Ready, roots, refused: None }
            }
        };
        note::write_pending(&data, &switch)?;
        Ok(switch)
    }

    /// Restores over the database, or goes on with that. The data directory is locked.
    async fn replace(
        &self,
        data: &Place,
        mut switch: Switch,
        stopped: Stopped,
        progress: Arc<Progress>,
    ) -> Result<Switch, Failure> {
        let Purpose::Replace { system, backup, timeline, order } = switch.purpose.clone() else {
            return Err(Failure::internal("not a replacement"));
        };
        if switch.phase == Phase::Done {
            // A server may have run since: nothing but this is left to be done.
            replace::open(&data.path)?;
            note::finish(data, &switch)?;
            return Ok(switch);
        }
        refuse_if_running(&data.path, stopped)?;
        let layout = Layout::new(self.work.cluster.clone(), system);
        let repository = Repository::new(open_store(self.work).await, layout, self.work.compression_level);
        let request = RestoreRequest { backup: Some(backup), timeline: Some(timeline), ..order.request()? };
        let to_the_end = request.target == RecoveryTarget::Latest;
        let plan = restore::plan(&repository, request).await?;
        let mut options = self.options_with(&data.path, &order, String::new());
        let kept =
            switch.kept_data().map(Path::to_owned).ok_or_else(|| Failure::internal("a replacement without a place"))?;
        if switch.phase == Phase::Ready {
            replace::check(&repository, &plan, &options).await?;
            let tablespaces = replaced_tablespaces(&data.path)?;
            let stays = to_the_end.then_some(timeline);
            wal::save(&data.path, &kept, stays)?;
            let noted = tablespaces.into_iter().map(|live| replaced_root(live, &kept));
            let data_root = switch.data().cloned();
            switch.roots = noted.collect::<Result<Vec<Root>, Failure>>()?.into_iter().chain(data_root).collect();
            switch.roots = with_tablespaces_of(&plan, &order, switch.roots, data)?;
            switch.phase = Phase::Switching;
            note::write_pending(data, &switch)?;
        }
        let kept_wal = if to_the_end { wal::saved(&kept, timeline)? } else { Vec::new() };
        let tail = to_the_end && !kept_wal.iter().any(|name| name.parse::<SegmentName>().is_ok());
        options.restore_command = match &order.restore_command {
            Some(command) => command.clone(),
            None => restore_command(&self.work.helper, self.process.wal_listen, system, tail)?,
        };
        let tablespaces = switch.roots.iter().filter(|root| root.role == Role::Tablespace);
        let there = Replaced { kept_wal, tablespaces: tablespaces.map(|root| root.live.clone()).collect() };
        let committed = Switch { phase: Phase::Done, ..switch };
        let (place, done) = (data.clone(), committed.clone());
        let commit = move || note::write_pending(&place, &done);
        replace::run(&repository, &plan, &options, there, stopped, progress, commit).await?;
        note::finish(data, &committed)?;
        Ok(committed)
    }
}

fn is_replacement(switch: &Switch) -> bool {
    matches!(switch.purpose, Purpose::Replace { .. })
}

/// The directories of the database's tablespaces, of the server's version. What is in them is from later than what is
/// restored: each has to be where it can be emptied.
fn replaced_tablespaces(data: &Path) -> Result<Vec<PathBuf>, Failure> {
    for link in tablespace_links(data)? {
        if !link.is_dir() {
            let leads_to = fs::read_link(&link).unwrap_or_default();
            return Err(Failure::new(
                Code::TargetDirectory,
                format!("{} leads to {}, which isn't there; nothing was changed", link.display(), leads_to.display()),
            )
            .hint("Mount its volume there: what is in it has to be removed. If it's lost for good, remove the link."));
        }
    }
    let locations = live_tablespaces(data)?;
    if locations.is_empty() {
        return Ok(Vec::new());
    }
    let version = version_directory(&DataDirectory::open(data)?)?;
    Ok(locations.into_iter().map(|location| location.join(&version)).collect())
}

/// A tablespace's directory that is emptied. Nothing of it is kept.
fn replaced_root(live: PathBuf, kept: &Path) -> Result<Root, Failure> {
    let kept = kept.join("nothing");
    Ok(Root { role: Role::Tablespace, old: inode(&live)?, live, staged: None, kept, way: Way::Whole, new: None })
}

/// With the directories in which the backup's tablespaces will be: another replacement that takes over must know them.
fn with_tablespaces_of(
    plan: &RestorePlan,
    order: &RestoreOrder,
    mut roots: Vec<Root>,
    data: &Place,
) -> Result<Vec<Root>, Failure> {
    let known = roots.iter().find(|root| root.role == Role::Tablespace);
    let version = match known.and_then(|root| root.live.file_name()) {
        Some(version) => version.to_string_lossy().into_owned(),
        None if plan.backup.tablespaces.is_empty() => return Ok(roots),
        // Where even that can't be told, an interrupted one has none that it could have written to.
        None => match version_directory(&DataDirectory::shut(&data.path)) {
            Ok(version) => version,
            Err(_) => return Ok(roots),
        },
    };
    let kept = roots.last().map(|root| root.kept.clone()).unwrap_or_default();
    for tablespace in &plan.backup.tablespaces {
        let location = order.tablespaces.get(&tablespace.location).unwrap_or(&tablespace.location);
        let live = Path::new(location).canonicalize().unwrap_or_else(|_| location.into()).join(&version);
        if !roots.iter().any(|root| root.live == live) {
            roots.insert(0, replaced_root(live, &kept)?);
        }
    }
    Ok(roots)
}

/// What has to be done before PostgreSQL starts: a restore that was prepared takes its place, or one that was interrupted goes
/// on. `None` if there's nothing to be done.
///
/// # Errors
/// As [`carry_out`]: PostgreSQL must not be started then.
pub async fn before_start(
    settings: &Settings,
    pgdata: &Path,
    stopped: Stopped,
    progress: Arc<Progress>,
) -> Result<Option<Switch>, Failure> {
    let path = pgdata.to_owned();
    let data = Place::of_data(&path)?;
    let Some(noted) = note::pending(&data)? else { return Ok(None) };
    if is_replacement(&noted) {
        let _lock = note::lock(&data)?;
        // It may have been taken back, or carried out, before it was locked.
        let Some(switch) = settled(&data)?.filter(is_replacement) else { return Ok(None) };
        let asker = Asker { work: settings.work()?, process: &settings.process };
        let done = asker.replace(&data, switch.clone(), stopped, progress).await;
        return match (done, has_begun(&data, &switch)?) {
            (Ok(done), _) => Ok(Some(done)),
            (Err(failure), true) => Err(failure.hint(format!("PostgreSQL doesn't start on {} until this has ended. Put right what is wrong and try again: it goes on. Or restore another backup over it with 'restore run --in-place --replace --backup'.", path.display()))),
            (Err(failure), false) => {
                settled(&data)?;
                Err(failure)
            }
        };
    }
    let carried = tokio::task::spawn_blocking(move || {
        carry_out(&path, stopped, &mut |step| {
            tracing::debug!(step, "switching");
            Ok(())
        })
    });
    carried.await?
}
