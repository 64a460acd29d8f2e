#!/usr/bin/env bash
# `make bench`: pgsidecar beside pgBackRest and barman-cloud; benches/README.md tells what is measured. Expects what setup-bench.sh and
# setup-s3s.sh fetch, and the release build.
#
#   BENCH="wal-drain wal-replay backup-full backup-incremental restore-full restore-chain tps daemon" TOOLS="pgsidecar pgbackrest barman-cloud floor" \
#       REPEAT=3 SCALE=30 SEGMENTS=128 BACKUP_SCALE=100 TRANSACTIONS=41000 STORE_LATENCY_MS=0 scripts/bench.sh
tools=${TOOLS:-} # before lib.sh, which means something else by it
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

unset PGSIDECAR_TEST_STORE PGSIDECAR_CLUSTER
PGSIDECAR_BENCH_ROOT=$(bench_root)
PG_BIN_18=$(pg_bin_18)
S3S_FS=$(s3s_fs)
PGSIDECAR_WAL=${CARGO_TARGET_DIR:-$ROOT/target}/release/pgsidecar-wal
PGSIDECAR_BENCH_RESULTS=$ROOT/target/bench/results.json
TMPDIR=$ROOT/target/bench/work
export PGSIDECAR_BENCH_ROOT PG_BIN_18 S3S_FS PGSIDECAR_WAL PGSIDECAR_BENCH_RESULTS TMPDIR

rm -rf "$TMPDIR" # of a run that failed
mkdir -p "$TMPDIR"
if [[ $EUID -eq 0 ]]; then
    chmod 1777 "$TMPDIR"
    as_postgres test -x "$TMPDIR" || die "the user postgres can't reach this checkout ($ROOT): put it where every user can enter"
fi
TOOLS=$tools cargo bench --locked -p pgsidecar --bench compare
rm -rf "$TMPDIR"
