//! Metrics for Prometheus, in the OpenMetrics text format: the status, as numbers.

use pgsidecar_core::drill::DrillOutcome;
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::ConstCounter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::Registry,
};

use pgsidecar_core::retention::{Growth, GrowthOf};

use crate::{daemon::Status, failure::Failure, pgdata::Volume, schedule::ScheduleStatus};

/// Renders what the status says.
///
/// # Errors
/// If the text can't be written.
pub fn render(status: &Status) -> Result<String, Failure> {
    let mut registry = Registry::with_prefix("pgsidecar");
    registry.register("build", "Version of pgsidecar", Info::new(vec![("version", status.version)]));
    registry.register(
        "degraded",
        "1 while something keeps pgsidecar from working; /v1/status says what",
        flag(!status.problems.is_empty()),
    );
    registry.register(
        "warnings",
        "How many things should be looked at that keep nothing from working; /v1/status says which",
        ConstGauge::new(i64::try_from(status.warnings.len()).unwrap_or(i64::MAX)),
    );
    if let Some(foreign) = status.foreign_data_directory {
        registry.register(
            "data_directory_foreign",
            "1 if the data directory belongs to another user than pgsidecar runs as",
            flag(foreign),
        );
    }
    registry.register(
        "store_look_first",
        "1 if the store doesn't refuse to overwrite by itself, so that two writers could pass each other",
        flag(status.conditional_creation.as_deref().is_some_and(|text| text != "honoured")),
    );
    let archive = &status.archive;
    registry.register(
        "archived_files",
        "WAL files acknowledged since the start",
        ConstCounter::new(archive.statistics.archived_files),
    );
    registry.register(
        "archive_failures",
        "Requests to archive that failed since the start",
        ConstCounter::new(archive.statistics.failures),
    );
    registry.register(
        "archive_conflicts",
        "Requests to archive that were refused because other content is there under that name",
        ConstCounter::new(archive.statistics.conflicts),
    );
    if let Some(last) = &archive.statistics.last.last_archived {
        registry.register(
            "last_archived_timestamp_seconds",
            "When a WAL file was acknowledged last",
            ConstGauge::new(last.at.as_second()),
        );
    }
    if let Some(files) = archive.backlog_files {
        registry.register(
            "archive_backlog_files",
            "WAL files that PostgreSQL waits to have archived",
            ConstGauge::new(i64::try_from(files).unwrap_or(i64::MAX)),
        );
    }
    if let Some(seconds) = archive.oldest_ready_seconds {
        registry.register(
            "archive_backlog_seconds",
            "Age of the oldest of them",
            ConstGauge::new(i64::try_from(seconds).unwrap_or(i64::MAX)),
        );
    }
    if let Some(directory) = &archive.directory {
        if let Some(files) = directory.files {
            registry.register(
                "archive_directory_files",
                "WAL files in the archive directory",
                ConstGauge::new(i64::try_from(files).unwrap_or(i64::MAX)),
            );
        }
        if let Some(seconds) = directory.oldest_seconds {
            registry.register(
                "archive_directory_oldest_seconds",
                "How long ago the oldest of them was written",
                ConstGauge::new(i64::try_from(seconds).unwrap_or(i64::MAX)),
            );
        }
        registry.register(
            "archive_directory_held_files",
            "How many of them stay because they can't be taken or removed",
            ConstGauge::new(i64::try_from(directory.held_files).unwrap_or(i64::MAX)),
        );
    }
    register_volumes(&mut registry, &status.volumes);
    if let Some(at) = status.last_backup.as_ref().map(|backup| backup.stopped_at) {
        registry.register(
            "last_backup_timestamp_seconds",
            "End of the last complete base backup",
            ConstGauge::new(at.as_second()),
        );
    }
    if let Some(pages) = status.last_backup.as_ref().map(|backup| backup.damaged_pages) {
        registry.register(
            "last_backup_damaged_pages",
            "Pages of the database whose checksum was wrong when it was taken",
            ConstGauge::new(i64::try_from(pages).unwrap_or(i64::MAX)),
        );
    }
    if let Some(dump) = &status.last_dump {
        registry.register(
            "last_dump_timestamp_seconds",
            "End of the last complete dump",
            ConstGauge::new(dump.finished_at.as_second()),
        );
    }
    registry.register(
        "dump_failed",
        "1 if the last dump that was tried since the start failed",
        flag(status.last_dump_failure.is_some()),
    );
    if let Some(restores) = &status.restores {
        registry.register(
            "restore_pending",
            "1 if another database takes the place of this one at the next start",
            flag(restores.pending.is_some()),
        );
        registry.register(
            "restores_kept",
            "Earlier databases that restores in place have kept on the volume",
            ConstGauge::new(i64::try_from(restores.kept).unwrap_or(i64::MAX)),
        );
    }
    if let Some(drill) = &status.last_drill {
        registry.register(
            "last_drill_timestamp_seconds",
            "End of the last drill",
            ConstGauge::new(drill.ended_at.as_second()),
        );
        registry.register(
            "last_drill_passed",
            "1 if it passed, 0 if it failed or could not be tried",
            flag(drill.outcome == DrillOutcome::Passed),
        );
    }
    if let Some(growth) = &status.growth {
        register_growth(&mut registry, growth);
    }
    schedules(&mut registry, &status.schedule);
    let mut text = String::new();
    encode(&mut text, &registry).map_err(Failure::internal)?;
    Ok(text)
}

/// The database's file systems, by what they hold.
fn register_volumes(registry: &mut Registry, volumes: &[Volume]) {
    type Value = fn(&Volume) -> u64;
    let metrics: [(&str, &str, Value); 2] = [
        ("volume_available_bytes", "What PostgreSQL can still write to the volume of its data or WAL", |volume| {
            volume.available_bytes
        }),
        ("volume_size_bytes", "The size of that volume", |volume| volume.size_bytes),
    ];
    for (name, help, value) in metrics {
        let family = Family::<Vec<(&str, &str)>, Gauge>::default();
        for volume in volumes {
            let bytes = i64::try_from(value(volume)).unwrap_or(i64::MAX);
            family.get_or_create(&vec![("holds", volume.holds)]).set(bytes);
        }
        registry.register(name, help, family);
    }
}

/// How the repository grows, by kind.
fn register_growth(registry: &mut Registry, growth: &Growth) {
    type Value = fn(&GrowthOf) -> Option<u64>;
    let metrics: [(&str, &str, Value); 3] = [
        ("repository_bytes", "What there is in the repository", |kind| Some(kind.bytes)),
        ("repository_bytes_per_day", "What came in a day, over the last 30 days", |kind| kind.bytes_per_day),
        ("repository_levels_off_at_bytes", "At what the retention in force holds it, if it does", |kind| {
            kind.levels_off_at_bytes
        }),
    ];
    for (name, help, value) in metrics {
        let family = Family::<Vec<(&str, &str)>, Gauge>::default();
        for kind in &growth.kinds {
            if let Some(bytes) = value(kind) {
                family.get_or_create(&vec![("kind", kind.kind.as_str())]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
            }
        }
        registry.register(name, help, family);
    }
}

/// One series a task.
fn schedules(registry: &mut Registry, tasks: &[ScheduleStatus]) {
    type OfTasks = Family<Vec<(&'static str, String)>, Gauge>;
    let mut register = |name: &str, help: &str, value: &dyn Fn(&ScheduleStatus) -> Option<i64>| {
        let family = OfTasks::default();
        for task in tasks {
            if let Some(value) = value(task) {
                family.get_or_create(&vec![("task", task.task.to_string())]).set(value);
            }
        }
        registry.register(name, help, family);
    };
    if tasks.is_empty() {
        return;
    }
    register("schedule_next_timestamp_seconds", "When a scheduled task begins next", &|task| {
        task.next.map(|next| next.as_second())
    });
    register("schedule_last_success_timestamp_seconds", "When it was done last", &|task| {
        task.last_success.as_ref().map(|last| last.ended_at.as_second())
    });
    register("schedule_consecutive_failures", "How many runs have failed since then, while this daemon ran", &|task| {
        Some(i64::from(task.failures))
    });
}

fn flag(set: bool) -> ConstGauge<i64> {
    ConstGauge::new(i64::from(set))
}
