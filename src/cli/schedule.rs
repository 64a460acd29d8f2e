//! `pgsidecar schedule`

use clap::Args;
use jiff::{Timestamp, tz::TimeZone};

use super::{OutputArgs, output};
use crate::{client::Client, failure::Failure, schedule::ScheduleStatus, settings::Settings};

/// `schedule`
#[derive(Args, Debug)]
pub struct ScheduleArgs {
    /// Tell what the settings here say, without asking the daemon
    #[arg(long)]
    offline: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Shows what is done by schedule.
///
/// # Errors
/// If the daemon can't be reached; wrong settings.
pub async fn run(settings: &Settings, args: &ScheduleArgs) -> Result<(), Failure> {
    let tasks: Vec<ScheduleStatus> = if args.offline {
        let schedules = &settings.work()?.schedules;
        let now = Timestamp::now();
        schedules.iter().map(|(task, schedule)| ScheduleStatus::by_schedule(*task, schedule, now)).collect()
    } else {
        Client::new(&settings.process.control_socket).get("/v1/schedule").await?
    };
    if args.output.json {
        return output::print_json(&tasks);
    }
    if tasks.is_empty() {
        return output::print_line(
            "Nothing is done by schedule: PGSIDECAR_SCHEDULE_FULL and others say what is, and when.",
        );
    }
    tasks.iter().try_for_each(|task| lines(task).iter().try_for_each(|line| output::print_line(line)))
}

/// What is told of a task, to people.
fn lines(status: &ScheduleStatus) -> Vec<String> {
    let zone = TimeZone::get(&status.time_zone).unwrap_or(TimeZone::UTC);
    let show = |time: Timestamp| time.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S%:z").to_string();
    let line = |name: &str, text: String| format!("  {name:<9} {text}");
    let mut lines = vec![format!("{:<12}{} ({})", status.task.to_string(), status.cron, status.time_zone)];
    if let Some(since) = status.running_since {
        lines.push(line("running", format!("since {}", show(since))));
    }
    if let Some(why) = &status.waiting {
        lines.push(line("waits", why.clone()));
    }
    let again = status.next.filter(|next| status.running_since.is_none() && !status.upcoming.contains(next));
    let upcoming: Vec<String> = again.iter().chain(&status.upcoming).map(|time| show(*time)).collect();
    lines.push(line("next", if upcoming.is_empty() { "never".to_owned() } else { upcoming.join(", ") }));
    if let Some(last) = &status.last_success {
        lines.push(line("last", format!("{}: {}", show(last.ended_at), last.result)));
    }
    if let Some(problem) = status.problem() {
        lines.push(line("problem", problem.message));
        lines.extend((!problem.hint.is_empty()).then(|| line("", format!("HINT: {}", problem.hint))));
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pgsidecar_core::schedule::{Schedule, Task};

    use super::*;
    use crate::{
        failure::Code,
        schedule::{LastFailure, LastSuccess},
    };

    #[test]
    fn times_are_those_of_the_zone_s_clock() {
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let schedule = Schedule::new("30 2 * * *".parse().unwrap(), zone, Duration::ZERO, "main");
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let plain = ScheduleStatus::by_schedule(Task::Full, &schedule, at("2026-10-24T12:00:00Z"));
        let failed = ScheduleStatus {
            next: Some(at("2026-10-24T12:04:00Z")),
            last_success: Some(LastSuccess {
                scheduled_for: at("2026-10-23T00:30:00Z"),
                ended_at: at("2026-10-23T00:41:07Z"),
                result: "20261023T003002Z-full".into(),
            }),
            failures: 3,
            last_failure: Some(LastFailure {
                at: at("2026-10-24T12:00:00Z"),
                failure: Failure::new(Code::StoreUnavailable, "the store does not answer").hint("Wait."),
            }),
            ..plain.clone()
        };
        insta::assert_snapshot!([lines(&plain), lines(&failed)].concat().join("\n"));
    }
}
