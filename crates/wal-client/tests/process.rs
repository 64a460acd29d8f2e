//! What only the built program can show: its exit status as PostgreSQL's shell sees it, and that it survives
//! a log that nobody reads.

use std::{
    io::{self, Read, Write},
    net::TcpListener,
    process::{Command, ExitStatus, Stdio},
    thread,
};

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgsidecar-wal"));
    command.args(args).env_remove("PGSIDECAR_ADDRESS").env_remove("PGSIDECAR_WAL_TIMEOUT");
    command.current_dir(env!("CARGO_TARGET_TMPDIR"));
    command
}

/// Both outputs are pipes whose readers are gone: writing means SIGPIPE, unless it is ignored.
fn unheard(mut command: Command) -> io::Result<ExitStatus> {
    let (reader, stdout) = io::pipe()?;
    let stderr = stdout.try_clone()?;
    drop(reader);
    command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).status()
}

#[test]
fn a_closed_log_changes_no_exit_code() {
    assert_eq!(unheard(program(&["archive"])).unwrap().code(), Some(1));
    assert_eq!(unheard(program(&["restore"])).unwrap().code(), Some(200));
    assert_eq!(unheard(program(&[])).unwrap().code(), Some(2));
    assert_eq!(unheard(program(&["--help"])).unwrap().code(), Some(0));
    // Port 1 of an address of its own: refused.
    let args = ["archive", "pg_wal/000000010000000000000042", "--address", "127.78.0.1:1", "--timeout", "1"];
    assert_eq!(unheard(program(&args)).unwrap().code(), Some(1));
    let args = ["restore", "000000010000000000000042", "RECOVERYXLOG", "--address", "127.78.0.1:1", "--timeout", "1"];
    assert_eq!(unheard(program(&args)).unwrap().code(), Some(200));
}

#[test]
fn the_environment_names_the_daemon() {
    let listener = TcpListener::bind("127.78.0.2:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let daemon = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let read = stream.read(&mut request).unwrap();
        stream.write_all(b"HTTP/1.1 204 No Content\r\nPgsidecar-Protocol: 1\r\n\r\n").unwrap();
        String::from_utf8_lossy(&request[..read]).into_owned()
    });
    let mut command = program(&["archive", "pg_wal/00000002.history"]);
    let output = command.env("PGSIDECAR_ADDRESS", &address).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
    assert!(daemon.join().unwrap().starts_with("POST /v1/wal/00000002.history/archive HTTP/1.1\r\n"));
}
