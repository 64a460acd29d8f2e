//! The figures: a table for people, `results.json` for programs.

use std::{collections::BTreeMap, fs, path::PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    options::TOOLS,
    run::{BUSY, Bench, Outcome, say},
    targets,
    tools::Tool,
    works::Work,
};

/// What the ratios refer to.
const REFERENCE: &str = "pgbackrest";

/// All outcomes so far.
pub struct Report {
    results: PathBuf,
    versions: Vec<(String, String)>,
    outcomes: Vec<(Work, &'static str, Vec<Outcome>)>,
    /// What could not be measured, and why.
    failures: Vec<(Work, &'static str, String)>,
    tps: Vec<Tps>,
    daemon: Option<DaemonFigures>,
    /// In milliseconds.
    store_latency: u64,
}

/// pgbench's transactions a second around backups.
#[derive(Clone, Copy)]
pub struct Tps {
    pub before: f64,
    pub during: f64,
    pub after: f64,
    /// Backups that were taken meanwhile; the last one went on a bit longer.
    pub backups: usize,
    /// The largest share of the machine that others had during one of the three.
    pub disturbance: f64,
}

/// Of pgsidecar's daemon.
struct DaemonFigures {
    idle: u64,
    call_median: f64,
    call_p99: f64,
}

impl Report {
    pub fn new(bench: &Bench, tools: &[Box<dyn Tool>]) -> Report {
        let versions = tools.iter().map(|tool| (tool.name().to_owned(), tool.version())).collect();
        Report {
            results: bench.options.results.clone(),
            versions,
            outcomes: Vec::new(),
            failures: Vec::new(),
            tps: Vec::new(),
            daemon: None,
            store_latency: bench.store.latency_ms(),
        }
    }

    /// One run's outcome.
    pub fn add(&mut self, work: Work, tool: &'static str, outcome: Outcome) {
        let figures = Figures::of(&outcome);
        say(&format!("{} s, {} MB/s, {} CPU s a GB", tidy(figures.seconds), tidy(figures.mb_per_s), tidy(figures.cpu)));
        match self.outcomes.iter_mut().find(|(of, by, _)| (*of, *by) == (work, tool)) {
            Some((_, _, outcomes)) => outcomes.push(outcome),
            None => self.outcomes.push((work, tool, vec![outcome])),
        }
        self.write();
    }

    /// That a work can't be measured with this tool.
    pub fn add_failure(&mut self, work: Work, tool: &'static str, why: String) {
        say(&format!("not measured: {why}"));
        self.failures.push((work, tool, why));
        self.write();
    }

    /// One run of `tps`.
    pub fn add_tps(&mut self, tps: Tps) {
        say(&format!("{:.0}, {:.0}, {:.0} transactions a second", tps.before, tps.during, tps.after));
        self.tps.push(tps);
        self.write();
    }

    /// The daemon's resident bytes when idle, and the milliseconds of a call.
    pub fn set_daemon(&mut self, idle: u64, call_median: f64, call_p99: f64) {
        self.daemon = Some(DaemonFigures { idle, call_median, call_p99 });
        self.write();
    }

    /// Writes what there is so far: a later run that fails takes nothing away.
    fn write(&self) {
        let latency = self.store_latency;
        let mut all: Vec<Value> =
            self.outcomes.iter().map(|(work, tool, outcomes)| result(*work, tool, latency, outcomes)).collect();
        all.extend(self.failures.iter().map(
            |(work, tool, why)| json!({"work": work.name(), "tool": tool, "store_latency_ms": latency, "not_measured": why}),
        ));
        if let Some(tps) = self.median_tps() {
            all.push(json!({
                "work": Work::Tps.name(), "tool": "pgsidecar", "store_latency_ms": latency,
                "tps_before": rounded(tps.before), "tps_during": rounded(tps.during), "tps_after": rounded(tps.after),
                "backups": tps.backups, "disturbance": rounded(tps.disturbance),
            }));
        }
        if let Some(DaemonFigures { idle, call_median, call_p99 }) = self.daemon {
            all.push(json!({
                "work": Work::Daemon.name(), "tool": "pgsidecar", "store_latency_ms": 0,
                "idle_mib": rounded(mib(idle)),
                "archive_call_ms": { "median": rounded(call_median), "p99": rounded(call_p99) },
            }));
        }
        fs::write(&self.results, serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
    }

    /// The run in the middle by what was left during backups.
    fn median_tps(&self) -> Option<Tps> {
        let mut sorted = self.tps.clone();
        sorted.sort_by(|a, b| (a.during / a.before).total_cmp(&(b.during / b.before)));
        sorted.get(sorted.len() / 2).copied()
    }

    /// The table.
    pub fn print(&self) {
        for (tool, version) in &self.versions {
            println!("{tool:<13} {version}");
        }
        if self.store_latency > 0 {
            println!("the store gets each request {} ms later than it could", self.store_latency);
        }
        for work in Work::ALL {
            self.print_work(work);
        }
        if let Some(tps) = self.median_tps() {
            println!("\ntps (pgsidecar), of pgbench");
            println!(
                "  before {:.0}; during {} full backups {:.0} ({:.0} %); after {:.0} ({:.0} %, at least 95 wanted)",
                tps.before,
                tps.backups,
                tps.during,
                tps.during / tps.before * 100.0,
                tps.after,
                tps.after / tps.before * 100.0
            );
            if tps.disturbance > BUSY {
                println!(
                    "  CAUTION: meanwhile {:.0} % of the machine went to something else.",
                    tps.disturbance * 100.0
                );
            }
        }
        if let Some(DaemonFigures { idle, call_median, call_p99 }) = self.daemon {
            println!("\ndaemon (pgsidecar)");
            println!("  idle {:.1} MiB resident", mib(idle));
            println!("  a call of archive_command for an archived segment {call_median:.2} ms, p99 {call_p99:.2} ms");
        }
        println!("\nthe figures of all runs: {}", self.results.display());
    }

    fn print_work(&self, work: Work) {
        let of_tool = |tool: &str| {
            self.outcomes.iter().find(|(of, by, _)| *of == work && *by == tool).map(|(_, _, outcomes)| outcomes)
        };
        for (_, tool, why) in self.failures.iter().filter(|(of, _, _)| *of == work) {
            println!("\n{} with {tool}: not measured: {}", work.name(), why.trim());
        }
        let Some(plain) = TOOLS.iter().find_map(|tool| of_tool(tool)).map(|outcomes| outcomes[0].plain) else { return };
        let reference = of_tool(REFERENCE).map(|outcomes| Summary::of(outcomes));
        let material = work.material();
        println!("\n{} of {:.0} MB of {material} (ratio to {REFERENCE})", work.name(), plain as f64 / 1e6);
        println!(
            "  {:<13} {:<26} {:<26} {:<30} {:<18} MB stored",
            "", "seconds", "MB/s", "CPU s a GB, machine", "peak MiB"
        );
        for tool in TOOLS {
            let Some(outcomes) = of_tool(tool) else { continue };
            let summary = Summary::of(outcomes);
            let cell = |value: &Range, reference: Option<&Range>| {
                let ratio = reference.map(|reference| format!(" ({:.2}x)", value.median / reference.median));
                let (least, most) = (tidy(value.least), tidy(value.most));
                format!("{} [{least}..{most}]{}", tidy(value.median), ratio.unwrap_or_default())
            };
            let reference = reference.as_ref();
            let peak = summary.peak.map_or("-".to_owned(), |peak| {
                let ratio = reference.and_then(|reference| Some(format!(" ({:.2}x)", peak / reference.peak?)));
                format!("{}{}", tidy(peak), ratio.unwrap_or_default())
            });
            let stored = summary.stored.map_or("-".to_owned(), |stored| {
                let ratio = reference.and_then(|reference| Some(stored as f64 / reference.stored? as f64));
                format!(
                    "{}{}",
                    tidy(stored as f64 / 1e6),
                    ratio.map(|ratio| format!(" ({ratio:.2}x)")).unwrap_or_default()
                )
            });
            println!(
                "  {tool:<13} {:<26} {:<26} {:<30} {peak:<18} {stored}",
                cell(&summary.seconds, reference.map(|reference| &reference.seconds)),
                cell(&summary.mb_per_s, reference.map(|reference| &reference.mb_per_s)),
                cell(&summary.cpu, reference.map(|reference| &reference.cpu)),
            );
        }
        if let (Some(ours), Some(reference)) = (of_tool("pgsidecar"), &reference) {
            for line in targets::lines(work, &Summary::of(ours), reference) {
                println!("  {line}");
            }
        }
        println!("  CPU seconds of the median run, by processes:");
        for tool in TOOLS {
            let Some(outcomes) = of_tool(tool) else { continue };
            let parts: Vec<String> =
                median_run(outcomes).usage.split.iter().map(|(part, seconds)| format!("{part} {seconds:.2}")).collect();
            println!("  {tool:<13} {}", parts.join(", "));
        }
        let disturbances = TOOLS.iter().filter_map(|tool| of_tool(tool)).flatten().map(Outcome::disturbance);
        let most = disturbances.fold(0.0, f64::max);
        if most > BUSY {
            println!("  CAUTION: in one of these runs {:.0} % of the machine went to something else.", most * 100.0);
        }
    }
}

/// The figures of one run.
struct Figures {
    seconds: f64,
    /// Of plain WAL or of the database, MB being 10^6 bytes.
    mb_per_s: f64,
    /// CPU seconds of the machine for 10^9 bytes of that.
    cpu: f64,
}

impl Figures {
    fn of(outcome: &Outcome) -> Figures {
        let Outcome { usage, plain, .. } = outcome;
        let plain = *plain as f64;
        Figures { seconds: usage.seconds, mb_per_s: plain / 1e6 / usage.seconds, cpu: usage.cpu / (plain / 1e9) }
    }
}

/// The median and the extremes of a figure.
pub struct Range {
    pub median: f64,
    least: f64,
    most: f64,
}

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Range {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Range { median: values[values.len() / 2], least: values[0], most: values[values.len() - 1] }
    }
}

/// The figures of all runs of a tool.
pub struct Summary {
    pub seconds: Range,
    pub mb_per_s: Range,
    /// CPU seconds of the machine for 10^9 bytes.
    pub cpu: Range,
    /// The highest of all runs, in MiB.
    pub peak: Option<f64>,
    pub peak_anonymous: Option<f64>,
    /// Bytes in the store, of the median run.
    pub stored: Option<u64>,
}

impl Summary {
    fn of(outcomes: &[Outcome]) -> Summary {
        let range = |figure: fn(Figures) -> f64| Range::of(outcomes.iter().map(|outcome| figure(Figures::of(outcome))));
        let highest = |bytes: fn(&Outcome) -> u64| {
            let bytes = outcomes.iter().map(bytes).max().unwrap_or(0);
            (bytes > 0).then(|| mib(bytes))
        };
        Summary {
            seconds: range(|figures| figures.seconds),
            mb_per_s: range(|figures| figures.mb_per_s),
            cpu: range(|figures| figures.cpu),
            peak: highest(|outcome| outcome.usage.peak),
            peak_anonymous: highest(|outcome| outcome.usage.peak_anonymous),
            stored: median_run(outcomes).stored,
        }
    }
}

fn median_run(outcomes: &[Outcome]) -> &Outcome {
    let mut sorted: Vec<&Outcome> = outcomes.iter().collect();
    sorted.sort_by(|a, b| a.usage.seconds.total_cmp(&b.usage.seconds));
    sorted[sorted.len() / 2]
}

/// An entry of `results.json`: medians, and all runs.
fn result(work: Work, tool: &str, store_latency: u64, outcomes: &[Outcome]) -> Value {
    let summary = Summary::of(outcomes);
    let mut entry = json!({
        "work": work.name(),
        "tool": tool,
        "store_latency_ms": store_latency,
        "plain_bytes": outcomes[0].plain,
        "seconds": rounded(summary.seconds.median),
        "mb_per_s": rounded(summary.mb_per_s.median),
        "cpu_seconds_per_gb": rounded(summary.cpu.median),
        "cpu_seconds": split(&median_run(outcomes).usage.split),
        "runs": outcomes.iter().map(|outcome| {
            let figures = Figures::of(outcome);
            json!({
                "seconds": rounded(figures.seconds),
                "mb_per_s": rounded(figures.mb_per_s),
                "cpu_seconds_per_gb": rounded(figures.cpu),
                "disturbance": rounded(outcome.disturbance()),
            })
        }).collect::<Vec<Value>>(),
    });
    if let Value::Object(entry) = &mut entry {
        let mut set = |name: &str, value: Option<Value>| value.and_then(|value| entry.insert(name.to_owned(), value));
        set("peak_mib", summary.peak.map(|mib| rounded(mib).into()));
        set("peak_anonymous_mib", summary.peak_anonymous.map(|mib| rounded(mib).into()));
        set("bytes_stored", summary.stored.map(Value::from));
    }
    entry
}

fn split(parts: &BTreeMap<String, f64>) -> Map<String, Value> {
    parts.iter().map(|(part, seconds)| (part.clone(), rounded(*seconds).into())).collect()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Three digits that count.
fn tidy(value: f64) -> String {
    match value {
        _ if value >= 100.0 => format!("{value:.0}"),
        _ if value >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
