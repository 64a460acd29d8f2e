//! Whether a server runs on a data directory, as far as it can be told from beside it: it may be in another container.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
    time::Duration,
};

use crate::pgdata::{DataDirectory, Listening, ServerState};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Whether two paths lead to one file or directory.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// What says that a server runs on the directory; `None` if nothing does. A copy of a running server's directory holds
/// that server's `postmaster.pid`, so that the file alone proves nothing.
pub(crate) fn server_on(directory: &Path) -> io::Result<Option<String>> {
    if let Some(pid) = process_in(directory) {
        return Ok(Some(format!("process {pid}")));
    }
    // Its processes can't be seen where it runs in another container. It listens then, where its file says.
    let (pid_file, listening) =
        match (fs::read_to_string(directory.join("postmaster.pid")), DataDirectory::server_in(directory)?) {
            (Ok(pid_file), ServerState::Running(listening) | ServerState::Stopping(listening)) => (pid_file, listening),
            _ => return Ok(None),
        };
    // Source: src/include/utils/pidfile.h. Line 2 is the data directory.
    let is_ours = pid_file.lines().nth(1).is_some_and(|path| is_same(Path::new(path), directory));
    Ok(is_ours.then(|| answers(&listening)).flatten())
}

/// A process whose working directory it is: those of a server all have theirs there.
fn process_in(directory: &Path) -> Option<u32> {
    let ours = std::process::id();
    let processes = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let mut servers = processes.filter(|pid: &u32| {
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        *pid != ours
            && is_same(Path::new(&format!("/proc/{pid}/cwd")), directory)
            // Not a shell that somebody has left there.
            && matches!(comm().trim_end(), "postgres" | "postmaster" | "edb-postgres")
    });
    servers.next()
}

/// Where somebody takes connections, if anybody does.
fn answers(listening: &Listening) -> Option<String> {
    let port = listening.port.map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let at_port = port.filter(|address| TcpStream::connect_timeout(address, CONNECT_TIMEOUT).is_ok());
    let at_socket = || listening.socket.as_ref().filter(|socket| UnixStream::connect(socket).is_ok());
    let place =
        at_port.map(|address| address.to_string()).or_else(|| at_socket().map(|path| path.display().to_string()));
    place.map(|place| format!("a server answers at {place}"))
}
