//! Whether a server runs on a data directory, as far as it can be told from beside it: it may be in another container.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
    time::Duration,
};

use crate::failure::{Code, Failure};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// PROC_PID_INIT_INO of the kernel's `include/linux/proc_ns.h`: in this namespace all processes of the machine are seen.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// What is known of a server before it's looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nothing: where `postmaster.pid` says that one runs, and that can't be disproved, one does.
    Unknown,
    /// The caller runs before it: only what shows that one runs counts.
    BeforeItsStart,
}

/// Whether two paths lead to one file or directory.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// Refuses a directory on which a server runs, or may run.
///
/// # Errors
/// [`Code::TargetDirectory`] with what says so.
pub(crate) fn refuse_if_running(directory: &Path, stopped: Stopped) -> Result<(), Failure> {
    let failed = |error: &io::Error| Failure::io(format!("reading {}", directory.display()), error);
    let verdict = match process_in(directory) {
        Processes::Server(pid) => Verdict::Runs(format!("process {pid}")),
        seen => match PidFile::read(directory).map_err(|error| failed(&error))? {
            // A server that was stopped in order has removed it.
            None => Verdict::Stopped,
            Some(pid_file) => pid_file.verdict(seen == Processes::AllSeen),
        },
    };
    judge(directory, verdict, stopped)
}

fn judge(directory: &Path, verdict: Verdict, stopped: Stopped) -> Result<(), Failure> {
    let refuse = |what: String, hint: &str| {
        Err(Failure::new(Code::TargetDirectory, format!("{what}; nothing was changed")).hint(hint))
    };
    match (verdict, stopped) {
        (Verdict::Runs(why), _) => refuse(
            format!("a server runs on {} ({why})", directory.display()),
            "Stop it first: in Kubernetes delete the pod, its successor goes on before PostgreSQL starts.",
        ),
        (Verdict::CantTell, Stopped::Unknown) => refuse(
            format!(
                "postmaster.pid in {} says that a server runs on it, and from here it can't be told whether that is so",
                directory.display()
            ),
            "Stop the server in order: it removes the file. If it was killed, and you are sure that no server runs on this directory, in no other container either, remove postmaster.pid.",
        ),
        (Verdict::CantTell, Stopped::BeforeItsStart) | (Verdict::Stopped, _) => Ok(()),
    }
}

/// What says that a server runs on the directory; `None` if nothing does. A copy of a running server's directory holds
/// that server's `postmaster.pid`, so that the file alone proves nothing.
pub(crate) fn server_on(directory: &Path) -> io::Result<Option<String>> {
    if let Processes::Server(pid) = process_in(directory) {
        return Ok(Some(format!("process {pid}")));
    }
    // Its processes can't be seen where it runs in another container. It listens then, where its file says.
    let Some(pid_file) = PidFile::read(directory)? else { return Ok(None) };
    let is_ours = is_same(Path::new(pid_file.line(2)), directory);
    Ok(match pid_file.verdict(false) {
        Verdict::Runs(why) if is_ours => Some(why),
        _ => None,
    })
}

/// What was found out of a server.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Runs(String),
    Stopped,
    CantTell,
}

/// The servers' processes that are seen.
#[derive(Debug, PartialEq, Eq)]
enum Processes {
    /// One of them is on the directory.
    Server(u32),
    /// None is, and all of the machine could be looked at.
    AllSeen,
    /// None is, but there may be others.
    SomeSeen,
}

/// A server's processes all have the data directory as their working directory.
fn process_in(directory: &Path) -> Processes {
    let ours = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Processes::SomeSeen };
    let mut all =
        fs::read_link("/proc/self/ns/pid").is_ok_and(|namespace| namespace == Path::new(INITIAL_PID_NAMESPACE));
    for pid in entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()) {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // Not a shell that somebody has left there.
        if pid == ours || !matches!(comm.trim_end(), "postgres" | "postmaster" | "edb-postgres") {
            continue;
        }
        let cwd = format!("/proc/{pid}/cwd");
        if is_same(Path::new(&cwd), directory) {
            return Processes::Server(pid);
        }
        // It may have ended meanwhile; else it's another user's.
        all &= fs::metadata(&cwd).is_ok() || !Path::new(&format!("/proc/{pid}")).exists();
    }
    if all { Processes::AllSeen } else { Processes::SomeSeen }
}

/// `postmaster.pid`.
/// Source: src/include/utils/pidfile.h. Line 2 is the data directory, 4 the port, 5 the first directory of sockets, 6 the
/// first listen address, 7 key and id of the System V shared memory.
struct PidFile(String);

impl PidFile {
    fn read(directory: &Path) -> io::Result<Option<PidFile>> {
        match fs::read_to_string(directory.join("postmaster.pid")) {
            Ok(text) => Ok(Some(PidFile(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn line(&self, number: usize) -> &str {
        self.0.lines().nth(number - 1).unwrap_or_default().trim()
    }

    fn verdict(&self, all_seen: bool) -> Verdict {
        if let Some(place) = self.answers() {
            return Verdict::Runs(format!("a server answers at {place}"));
        }
        match self.attached(&fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default()) {
            Some(0) => Verdict::Stopped,
            Some(n) => Verdict::Runs(format!("{n} processes have its shared memory")),
            None if all_seen => Verdict::Stopped,
            // Its container may have a memory of its own.
            None => Verdict::CantTell,
        }
    }

    /// Where somebody takes connections, if anybody does.
    fn answers(&self) -> Option<String> {
        let port: u16 = self.line(4).parse().ok()?;
        let address = match self.line(6) {
            "" => None,
            "*" | "localhost" => Some(Ipv4Addr::LOCALHOST.into()),
            other => other.parse().ok().map(|address: IpAddr| match address {
                IpAddr::V4(any) if any.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(any) if any.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
                address => address,
            }),
        };
        let address = address.map(|address| SocketAddr::new(address, port));
        if let Some(address) = address.filter(|address| TcpStream::connect_timeout(address, CONNECT_TIMEOUT).is_ok()) {
            return Some(address.to_string());
        }
        let directory = Some(self.line(5)).filter(|directory| directory.starts_with('/'))?;
        let socket = format!("{directory}/.s.PGSQL.{port}");
        UnixStream::connect(&socket).is_ok().then_some(socket)
    }

    /// How many processes have its shared memory, by the kernel's list; `None` if it isn't there: it was removed, or lies in
    /// another namespace. The containers of a pod have one in common. By this PostgreSQL itself tells whether a server that
    /// it finds noted still runs.
    fn attached(&self, list: &str) -> Option<u64> {
        let mut of = self.line(7).split_whitespace();
        let (key, id): (u64, u64) = (of.next()?.parse().ok()?, of.next()?.parse().ok()?);
        // Source: proc_sysvipc(5). Key and id come first, the number of processes is the seventh. A key is a C int, which
        // one of them writes without its sign.
        let number = |text: Option<&&str>| text.and_then(|text| text.parse::<i64>().ok());
        let mut segments = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = segments.find(|of| {
            let same_key = number(of.first()).is_some_and(|of| of.cast_unsigned() & 0xFFFF_FFFF == key & 0xFFFF_FFFF);
            same_key && number(of.get(1)).is_some_and(|of| of.cast_unsigned() == id)
        });
        ours?.get(6)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap
  11468939    3604480   600                    56  9900  9990      0   101   104   101   104 1795261604 1795261605 1795261600                  4096                     0
  11810886   11698177   600                    56  8283  8867      5   101   104   101   104 1795270694 1795270696 1795270686                  4096                     0
";

    fn pid_file(shared_memory: &str) -> PidFile {
        PidFile(format!("71\n/data\n1763714000\n1\n/nowhere\n\n{shared_memory}\nready   \n"))
    }

    #[test]
    fn shared_memory_tells_whether_a_server_runs() {
        assert_eq!(pid_file(" 11468939   3604480").attached(LIST), Some(0));
        assert_eq!(pid_file(" 11810886  11698177").attached(LIST), Some(5));
        assert_eq!(pid_file(" 11810886   3604480").attached(LIST), None);
        assert_eq!(pid_file("").attached(LIST), None);
        let large = "-1000 3604480 600 56 1 1 2 0 0 0 0";
        assert_eq!(pid_file(" 18446744073709550616 3604480").attached(large), Some(2));
    }

    #[test]
    fn what_can_not_be_told_is_refused_but_before_a_start() {
        let directory = tempfile::tempdir().unwrap();
        refuse_if_running(directory.path(), Stopped::Unknown).unwrap();
        let file = pid_file(" 99999999  99999999");
        assert_eq!(file.verdict(false), Verdict::CantTell);
        assert_eq!(file.verdict(true), Verdict::Stopped);
        let refused = judge(directory.path(), Verdict::CantTell, Stopped::Unknown).unwrap_err();
        assert!(refused.hint.contains("remove postmaster.pid"), "{refused}");
        fs::write(directory.path().join("postmaster.pid"), &file.0).unwrap();
        refuse_if_running(directory.path(), Stopped::BeforeItsStart).unwrap();
        assert_eq!(server_on(directory.path()).unwrap(), None);
    }

    #[test]
    fn whoever_answers_runs() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join(".s.PGSQL.5433");
        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let path = directory.path().display();
        let text = format!("71\n/mounted/elsewhere\n1763714000\n5433\n{path}\n::1\n 1 1\nready\n");
        fs::write(directory.path().join("postmaster.pid"), text).unwrap();
        for stopped in [Stopped::Unknown, Stopped::BeforeItsStart] {
            let refused = refuse_if_running(directory.path(), stopped).unwrap_err();
            assert!(refused.message.contains("a server runs on") && refused.message.contains(".s.PGSQL"), "{refused}");
        }
        // The clone of another server's directory is free all the same.
        assert_eq!(server_on(directory.path()).unwrap(), None);
    }
}
