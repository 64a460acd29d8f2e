//! The program: its settings, its signals, its exit codes.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    process::{Child, ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

use crate::support::client::plain_get;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgsidecar-webhook"));
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A program that serves, ended with this.
struct Running {
    child: Child,
    log: BufReader<ChildStderr>,
    health: SocketAddr,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(directory: &std::path::Path) -> Running {
        let mut child = program()
            .args(["serve", "--image", "pgsidecar:1", "--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"])
            .args(["--drain-timeout", "2s", "--log-format", "json", "--tls-directory"])
            .arg(directory)
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["message"], "pgsidecar-webhook is up");
        let health = line["health_listen"].as_str().unwrap().parse().unwrap();
        Running { child, log, health }
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    fn end(&mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }
}

#[tokio::test]
async fn it_serves_without_files_says_so_once_and_stops_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let mut running = Running::start(directory.path());
    assert_eq!(plain_get(running.health, "/healthz").await.0, 200);
    assert_eq!(plain_get(running.health, "/readyz").await.0, 503);
    running.signal("-TERM");
    let (code, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(log.matches("tls.crt: No such file or directory").count(), 1, "{log}");
    assert!(log.contains("It's looked for every few seconds."), "{log}");
    assert!(log.trim_end().lines().last().unwrap().contains(r#""message":"stopped""#), "{log}");
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let mut running = Running::start(directory.path());
    running.signal("-TERM");
    let mut line = String::new();
    while !line.contains("a second signal ends it at once") {
        line.clear();
        assert!(running.log.read_line(&mut line).unwrap() > 0);
    }
    let began = Instant::now();
    running.signal("-INT");
    let (code, log) = running.end();
    assert_eq!(code, Some(130), "{log}");
    assert!(began.elapsed() < Duration::from_millis(800), "{:?}", began.elapsed());
}

#[test]
fn wrong_settings_end_it_with_78_and_are_told_together() {
    let output =
        program().arg("serve").env("PGSIDECAR_WEBHOOK_LISTEN", "here").env("PGSIDECAR_LOG", "loud").output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    insta::assert_snapshot!(String::from_utf8_lossy(&output.stderr), @r#"
    error: 3 settings are wrong:
      PGSIDECAR_LOG: "loud" is none of error, warn, info, debug, trace
      PGSIDECAR_WEBHOOK_IMAGE: is required
      PGSIDECAR_WEBHOOK_LISTEN: "here" is not an address with a port, such as 0.0.0.0:8443
    hint: Each can be given as a flag or in the environment; --help lists them.
    "#);
}

#[test]
fn certificates_of_its_own_need_a_pod() {
    let output = program()
        .args(["serve", "--image", "pgsidecar:1", "--certificates", "self-managed", "--namespace", "pgsidecar-system"])
        .args(["--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("KUBERNETES_SERVICE_HOST is not set or not usable: this isn't a pod"), "{log}");
}

#[test]
fn an_address_that_is_taken_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = program()
        .args(["serve", "--image", "pgsidecar:1", "--health-listen", "127.0.0.1:0", "--listen", &address])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains(&format!("listening at {address}: Address already in use")), "{log}");
}

const STATEFUL_SET: &str = "apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  template:
    metadata:
      labels: {pgsidecar.dev/inject: 'true'}
    spec:
      containers:
      - name: postgres
        image: postgres:17
        volumeMounts: [{name: data, mountPath: /var/lib/postgresql/data}]
  volumeClaimTemplates: [{metadata: {name: data}}]
";

fn inject(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut child = program()
        .args(["inject", "--image", "pgsidecar:1"])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn manifests_are_injected_without_a_cluster() {
    let (code, yaml, errors) = inject(&["-f", "-"], STATEFUL_SET);
    assert_eq!(code, Some(0), "{errors}");
    assert!(yaml.contains("pgsidecar-prepare") && yaml.contains("image: pgsidecar:1"), "{yaml}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("db.yaml");
    std::fs::write(&file, STATEFUL_SET).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(inject(&["--filename", file], "").1, yaml);
    let (_, patch, _) = inject(&["-f", file, "--output", "patch", "-n", "shop"], "");
    let patch: serde_json::Value = serde_json::from_str(&patch).unwrap();
    assert_eq!((&patch[0]["kind"], &patch[0]["namespace"]), (&"StatefulSet".into(), &"shop".into()));
    let (_, json, _) = inject(&["-f", file, "--output", "json"], "");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["spec"]["template"]["spec"]["initContainers"][1]["name"], "pgsidecar");
}

#[test]
fn what_cannot_be_injected_is_told_and_nothing_is_printed() {
    let (code, text, errors) =
        inject(&["-f", "-"], &STATEFUL_SET.replace("    spec:\n", "    spec:\n      hostNetwork: true\n"));
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert!(errors.starts_with("error: StatefulSet default/db: pgsidecar: "), "{errors}");
    let (code, _, errors) = inject(&["-f", "/does/not/exist"], "");
    assert_eq!((code, errors.as_str()), (Some(1), "error: /does/not/exist: No such file or directory (os error 2)\n"));
    let output = program().args(["inject", "-f", "-"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
}
