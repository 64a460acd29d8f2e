//! What a run costs: time, CPU of the whole machine and of its parts, memory.
//!
//! All processes of a run descend from this one: orphans are adopted, see [`adopt_orphans`]. So what others do on the
//! machine can be told from it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How often processes are looked at. Each look costs about a millisecond.
const INTERVAL: Duration = Duration::from_millis(100);

/// The kernel's unit in `/proc/*/stat`. Linux has told 100 to every program for decades.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processes whose parent ends become children of this one, so that none gets out of sight.
pub fn adopt_orphans() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
}

/// What was used between [`Watch::begin`] and [`Watch::end`].
#[derive(Clone, Debug, Default)]
pub struct Usage {
    pub seconds: f64,
    /// CPU seconds of the whole machine.
    pub cpu: f64,
    /// The same by parts. `commands` is what PostgreSQL started as archive_command or restore_command; `other` is the
    /// kernel's own and what has nothing to do with this.
    pub split: BTreeMap<String, f64>,
    /// The peak of the sum of the tool's processes' resident memory, in bytes.
    pub peak: u64,
    /// Of that, what is anonymous, at its own peak.
    pub peak_anonymous: u64,
}

/// Looks at the machine from the side, in a thread.
pub struct Watch {
    began: Instant,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Usage>,
}

impl Watch {
    /// Begins now. `tool` is the name of the processes whose memory counts.
    pub fn begin(tool: &str) -> Watch {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, tool) = (stop.clone(), tool.to_owned());
        let (started, wait) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let mut looks = Looks::new(tool);
            let busy = busy_seconds();
            started.send(()).unwrap();
            while !stopped.load(Relaxed) {
                thread::park_timeout(INTERVAL);
                looks.look();
            }
            looks.usage(busy_seconds() - busy)
        });
        wait.recv().unwrap();
        Watch { began: Instant::now(), stop, thread }
    }

    /// Ends now, while all processes are still there.
    pub fn end(self) -> Usage {
        let seconds = self.began.elapsed().as_secs_f64();
        self.stop.store(true, Relaxed);
        self.thread.thread().unpark();
        let usage = self.thread.join().unwrap();
        reap_orphans();
        Usage { seconds, ..usage }
    }
}

/// The share of the machine that is busy just now, with nothing of ours under way.
pub fn background_load() -> f64 {
    let (began, busy) = (Instant::now(), busy_seconds());
    thread::sleep(Duration::from_millis(500));
    let processors = thread::available_parallelism().unwrap().get();
    (busy_seconds() - busy) / began.elapsed().as_secs_f64() / processors as f64
}

/// CPU seconds of all processors since the start: all but idle, waiting and stolen.
fn busy_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    let ticks: Vec<u64> = stat.lines().next().unwrap().split_whitespace().skip(1).map(|n| n.parse().unwrap()).collect();
    // user, nice, system, (idle, iowait), irq, softirq
    [0, 1, 2, 5, 6].iter().map(|&index| ticks[index]).sum::<u64>() as f64 / TICKS_PER_SECOND
}

/// One process, from `/proc/PID/stat`.
struct Process {
    name: String,
    parent: u32,
    /// Its own CPU seconds.
    own: f64,
    /// Those of its children that have ended and been waited for.
    ended_children: f64,
}

fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let seconds = |index: usize| Some(fields.get(index)?.parse::<u64>().ok()? as f64 / TICKS_PER_SECOND);
    Some(Process {
        name: name.to_owned(),
        parent: fields.get(1)?.parse().ok()?,
        own: seconds(11)? + seconds(12)?,
        ended_children: seconds(13)? + seconds(14)?,
    })
}

/// All processes that descend from this one, with this one.
fn family() -> HashMap<u32, Process> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut all: HashMap<u32, Process> = pids.filter_map(|pid| Some((pid, process(pid)?))).collect();
    let me = std::process::id();
    let ours = |mut pid: u32| {
        while pid != me {
            match all.get(&pid) {
                Some(process) => pid = process.parent,
                None => return false,
            }
        }
        true
    };
    let others: Vec<u32> = all.keys().copied().filter(|&pid| !ours(pid)).collect();
    all.retain(|pid, _| !others.contains(pid));
    all
}

/// CPU seconds of one child of ours with all that it has started.
#[derive(Clone, Default)]
struct Tree {
    name: String,
    total: f64,
    /// Of that, what PostgreSQL's processes (not the postmaster) have started and waited for, by process.
    commands: HashMap<u32, f64>,
}

/// What has been seen so far.
struct Looks {
    tool: String,
    before: HashMap<u32, Tree>,
    trees: HashMap<u32, Tree>,
    own: f64,
    peak: u64,
    peak_anonymous: u64,
}

impl Looks {
    fn new(tool: String) -> Looks {
        let mut looks =
            Looks { tool, before: HashMap::new(), trees: HashMap::new(), own: 0.0, peak: 0, peak_anonymous: 0 };
        looks.look();
        looks.before = std::mem::take(&mut looks.trees);
        looks.own = -own_seconds();
        (looks.peak, looks.peak_anonymous) = (0, 0);
        looks
    }

    fn look(&mut self) {
        let family = family();
        let me = std::process::id();
        let mut totals: HashMap<u32, f64> = HashMap::new();
        for (&pid, process) in &family {
            if pid == me {
                continue;
            }
            let mut root = pid;
            while family[&root].parent != me {
                root = family[&root].parent;
            }
            *totals.entry(root).or_default() += process.own + process.ended_children;
            let tree = self.trees.entry(root).or_default();
            if process.name == "postgres" && pid != root {
                tree.commands.insert(pid, process.ended_children);
            }
            if pid == root {
                tree.name.clone_from(&process.name);
            }
        }
        for (root, total) in totals {
            self.trees.entry(root).or_default().total = total;
        }
        let its: Vec<u32> =
            family.iter().filter(|(_, process)| process.name == self.tool).map(|(&pid, _)| pid).collect();
        let sum = |field: &str| its.iter().filter_map(|&pid| status_bytes(pid, field)).sum::<u64>();
        // One daemon has a peak that the kernel knows; of several processes, only what they have at a time counts.
        let resident = if self.tool == "pgsidecar" { sum("VmHWM") } else { sum("VmRSS") };
        self.peak = self.peak.max(resident);
        self.peak_anonymous = self.peak_anonymous.max(sum("RssAnon"));
    }

    fn usage(self, cpu: f64) -> Usage {
        let mut split: BTreeMap<String, f64> = BTreeMap::new();
        *split.entry("bench".to_owned()).or_default() += self.own + own_seconds();
        for (root, tree) in &self.trees {
            let before = self.before.get(root).cloned().unwrap_or_default();
            let commands: f64 = tree
                .commands
                .iter()
                .map(|(pid, seconds)| seconds - before.commands.get(pid).copied().unwrap_or_default())
                .sum();
            *split.entry(tree.name.clone()).or_default() += tree.total - before.total - commands;
            if !tree.commands.is_empty() {
                *split.entry("commands".to_owned()).or_default() += commands;
            }
        }
        let known: f64 = split.values().sum();
        split.insert("other".to_owned(), (cpu - known).max(0.0));
        Usage { seconds: 0.0, cpu, split, peak: self.peak, peak_anonymous: self.peak_anonymous }
    }
}

fn own_seconds() -> f64 {
    process(std::process::id()).map_or(0.0, |process| process.own)
}

/// A field of `/proc/PID/status` that is told in kB, in bytes.
pub fn status_bytes(pid: u32, field: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// Waits for adopted processes that have ended. Those that this program has started itself are left to who did.
fn reap_orphans() {
    let me = std::process::id();
    for (pid, process) in family() {
        if process.parent == me && process.name == "pgbackrest" {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG).ok();
        }
    }
}
