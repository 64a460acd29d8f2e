//! A store that answers, but not with what it was asked for: throttled, out of order, or with credentials that aren't
//! accepted for a while. Under load, and nobody does anything about it.

use std::{
    fs,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use crate::support::{Look, Postgres, Proxy, Repository, Scratch, Sidecar, Way, Wire, beside, wait_until};

const PATIENCE: Duration = Duration::from_secs(90);
/// How long the store is out of order.
const OUTAGE: Duration = Duration::from_secs(12);

/// A server that archives to S3 through a proxy, and writes about two segments of 1 MB a second.
struct UnderLoad {
    postgres: Postgres,
    sidecar: Sidecar,
    repository: Repository,
    proxy: Proxy,
    wire: Wire,
    load: Child,
}

impl UnderLoad {
    fn start(scratch: &Scratch) -> UnderLoad {
        let repository = Repository::s3();
        // The one knows what to do to all requests, the other what to do to some.
        let proxy = Proxy::before(&repository);
        let wire = Wire::to(proxy.url().strip_prefix("http://").unwrap());
        let (mut postgres, mut sidecar) = beside(scratch, 15, &["--wal-segsize=1"], &repository);
        sidecar.through(&wire);
        let settings = sidecar.archive_settings();
        postgres.configure(&settings.iter().map(String::as_str).collect::<Vec<_>>());
        // What is archived stays, to be compared.
        postgres.configure(&["wal_keep_size = 2GB", "max_wal_size = 2GB"]);
        postgres.start(&[]);
        sidecar.start();
        postgres.sql("CREATE TABLE t (n int, u uuid)");
        let script = scratch.path().join("load.sql");
        fs::write(&script, "INSERT INTO t SELECT n, gen_random_uuid() FROM generate_series(1, 5000) n;\n").unwrap();
        let mut load = postgres.client("pgbench");
        let load = load.args(["-n", "-c", "2", "-R", "4", "-T", "600", "-f"]).arg(&script);
        let load = load.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut all = UnderLoad { postgres, sidecar, repository, proxy, wire, load };
        all.archived_more(3);
        all
    }

    fn archived(&self) -> u64 {
        self.sidecar.metric("pgsidecar_archived_files_total").parse().unwrap()
    }

    fn archived_more(&mut self, files: u64) {
        let before = self.archived();
        wait_until("some segments are archived", PATIENCE, || self.archived() >= before + files);
    }

    /// For some time, PostgreSQL answers and the pod is ready.
    fn goes_on_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            assert!(self.postgres.exited().is_none(), "{}", self.postgres.log());
            assert_eq!(self.postgres.sql("SELECT 1"), "1");
            assert_eq!(self.sidecar.health("/readyz").status, 200);
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn end_load(&mut self) {
        self.load.kill().unwrap();
        self.load.wait().unwrap();
    }

    /// Everything is archived, without anybody's doing, and identical.
    fn drains_by_itself(&mut self) {
        let ready = || {
            let entries = fs::read_dir(self.postgres.data.join("pg_wal/archive_status")).unwrap();
            entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".ready")).count()
        };
        wait_until("the backlog has drained", PATIENCE, || ready() == 0);
        let look = Look::into(&self.repository);
        look.check_all_whole();
        let names = self.postgres.wal_files("0000000100000000");
        let done: Vec<_> = names.iter().filter(|name| self.postgres.is_marked(name, "done")).collect();
        assert!(done.len() > 15, "{done:?}");
        for name in done {
            assert!(look.wal(name).as_ref() == Some(&self.postgres.wal_file(name)), "{name}");
        }
        wait_until("the status is clean", PATIENCE, || {
            self.sidecar.json(&["status"])["problems"] == serde_json::json!([])
        });
        assert_eq!(self.sidecar.metric("pgsidecar_degraded"), "0");
        assert_eq!(self.sidecar.metric("pgsidecar_archive_backlog_files"), "0");
    }

    /// How often the log says this.
    fn said(&self, words: &str) -> usize {
        self.sidecar.log().matches(words).count()
    }
}

/// The store gives these answers to everything, one after the other.
fn an_outage_is_survived(answers: &[(u16, &'static str)], code: &str, words: &str) {
    let scratch = Scratch::new();
    let mut all = UnderLoad::start(&scratch);
    for (status, s3_code) in answers {
        all.proxy.set(Way::Failing(*status, s3_code));
        all.goes_on_for(OUTAGE / u32::try_from(answers.len()).unwrap());
    }
    let status = all.sidecar.json(&["status"]);
    assert_eq!(status["state"], "degraded");
    let problem = &status["problems"][0];
    assert_eq!(problem["code"], code, "{status:#}");
    assert!(problem["message"].as_str().unwrap().contains(words), "{status:#}");
    assert!(status["archive"]["backlog_files"].as_u64().unwrap() >= 10, "{status:#}");
    assert!(status["archive"]["oldest_ready_seconds"].as_u64().unwrap() >= 8, "{status:#}");
    assert_eq!(all.sidecar.metric("pgsidecar_degraded"), "1");
    assert!(all.sidecar.metric("pgsidecar_archive_backlog_files").parse::<u64>().unwrap() >= 10);
    assert!(all.sidecar.metric("pgsidecar_archive_failures_total").parse::<u64>().unwrap() >= 2);
    all.end_load();

    all.proxy.set(Way::Open);
    all.drains_by_itself();
    assert_eq!((all.said("archiving failed"), all.said("archiving works again")), (1, 1), "{}", all.sidecar.log());
}

#[test]
fn a_store_that_throttles_costs_postgresql_nothing_and_the_backlog_drains_by_itself_pg15() {
    an_outage_is_survived(&[(503, "SlowDown"), (429, "TooManyRequests")], "store_unavailable", "slow down");
}

#[test]
fn a_store_out_of_order_costs_postgresql_nothing_and_the_backlog_drains_by_itself_pg15() {
    // With 200, the error is in the body, as no store should say it to a PUT.
    let answers =
        [(499, "ClientClosedRequest"), (200, "InternalError"), (409, "OperationAborted"), (500, "InternalError")];
    an_outage_is_survived(&answers, "store_unavailable", "500 InternalError");
}

#[test]
fn credentials_that_are_not_accepted_for_a_while_need_nobodys_doing_pg15() {
    an_outage_is_survived(&[(403, "ExpiredToken")], "store_denied", "403 ExpiredToken");
}

#[test]
fn a_store_that_takes_some_requests_and_not_others_is_told_of_now_and_then_pg15() {
    let scratch = Scratch::new();
    let mut all = UnderLoad::start(&scratch);
    let archived = all.archived();
    all.wire.throttle(5);
    all.goes_on_for(2 * OUTAGE);
    assert!(all.archived() > archived, "what is taken counts");
    let failures: u64 = all.sidecar.metric("pgsidecar_archive_failures_total").parse().unwrap();
    assert!(failures >= 5, "{failures}");
    let told = (all.said("archiving failed"), all.said("archiving works again"));
    all.end_load();
    all.wire.throttle(1);
    all.drains_by_itself();
    assert_eq!(told, (1, 1), "{failures} failures");
}
