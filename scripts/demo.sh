#!/usr/bin/env bash
# A database, its backup, a disaster, and the database as it was a second before.
# STORE= (empty): the repository is a local directory; STORE=s3: a real S3 server on loopback.
source "$(dirname "$0")/lib.sh"

STORE=${STORE:-}
BIN=$(pg_bin_15)
[[ -x $BIN/initdb ]] || die "no PostgreSQL at $BIN: set PG_BIN_15 to a directory with initdb, postgres and pgbench"
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}/release
WORK=$(mktemp -d "${TMPDIR:-/tmp}/pgsidecar-demo.XXXXXX")
BEGAN=$SECONDS
PIDS=()

cleanup() {
    local status=$?
    set +e # that a server ends by our signal is no failure
    [[ -d $WORK/data ]] && run pg_ctl -D "$WORK/data" -m immediate stop >/dev/null 2>&1
    [[ -d $WORK/restored ]] && run pg_ctl -D "$WORK/restored" -m immediate stop >/dev/null 2>&1
    for pid in "${PIDS[@]}"; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null; done
    if [[ $status -eq 0 ]]; then rm -rf "$WORK"; else echo "The demo failed; what it left is in $WORK" >&2; fi
    exit "$status"
}
trap cleanup EXIT

# PostgreSQL refuses to run as root, and the sidecar runs as the same user.
AS=(env "PATH=$BIN:$WORK/bin:$PATH")
if [[ $EUID -eq 0 ]]; then AS=(setpriv --reuid=postgres --regid=postgres --clear-groups "${AS[@]}"); fi
run() { "${AS[@]}" "$@"; }
# A server or sidecar in the background; its pid is in PIDS.
start() {
    local log=$1
    shift
    # Not through run: the pid would be that of a shell around it.
    "${AS[@]}" "$@" >"$log" 2>&1 &
    PIDS+=($!)
}
sql() { run psql -X -q -A -t -v ON_ERROR_STOP=1 -h "$WORK/$1" -d bench -c "$2"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

mkdir "$WORK/bin" "$WORK/live" "$WORK/side"
cp "$TARGET/pgsidecar" "$TARGET/pgsidecar-wal" "$WORK/bin/"
if [[ $EUID -eq 0 ]]; then chown -R postgres:postgres "$WORK"; fi
cd "$WORK"

export PGDATA=$WORK/data PGHOST=$WORK/live PGUSER PGSIDECAR_CONTROL_SOCKET=$WORK/control.sock PGSIDECAR_SPOOL=$WORK/spool
PGUSER=$(run id -un)
WAL_PORT=$(free_port)
export PGSIDECAR_WAL_LISTEN=127.0.0.1:$WAL_PORT PGSIDECAR_HEALTH_LISTEN=127.0.0.1:0 PGSIDECAR_ADDRESS=127.0.0.1:$WAL_PORT
export HOME=$WORK
unset PGSIDECAR_CLUSTER PGDATABASE PGPORT PGPASSFILE
case $STORE in
"") export PGSIDECAR_REPOSITORY=file://$WORK/repository ;;
s3)
    "$ROOT/scripts/setup-s3s.sh"
    S3_PORT=$(free_port)
    run mkdir -p "$WORK/s3/backups"
    start "$WORK/s3.log" "$(s3s_fs)" --host 127.0.0.1 --port "$S3_PORT" --access-key demo --secret-key demosecret "$WORK/s3"
    wait_until 50 bash -c "exec 3<>/dev/tcp/127.0.0.1/$S3_PORT"
    export PGSIDECAR_REPOSITORY=s3://backups/demo AWS_ENDPOINT_URL_S3=http://127.0.0.1:$S3_PORT AWS_REGION=us-east-1
    export AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY=demosecret
    ;;
*) die "STORE=$STORE: it's empty (a local directory) or s3" ;;
esac

say "1. A PostgreSQL and, beside it, the sidecar. Repository: $PGSIDECAR_REPOSITORY"
run initdb -D "$PGDATA" -A trust --no-sync --data-checksums >"$WORK/initdb.log"
cat >>"$PGDATA/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$WORK/live'
archive_mode = on
archive_command = '$WORK/bin/pgsidecar-wal --address $PGSIDECAR_ADDRESS archive %p'
CONF
run pg_ctl -D "$PGDATA" -w -l "$WORK/postgres.log" start >/dev/null
run createdb -h "$WORK/live" bench
start "$WORK/sidecar.log" pgsidecar run
wait_until 100 run pgsidecar status
run pgsidecar check

say "2. Writes with pgbench, and a base backup meanwhile"
run pgbench -i -q -s 10 -h "$WORK/live" bench 2>/dev/null
run pgbench -n -c 2 -T 6 -h "$WORK/live" bench >"$WORK/pgbench.log" 2>&1 &
PGBENCH=$!
run pgsidecar backup create --fast --label demo
wait "$PGBENCH"
run pgsidecar backup list

say "3. What there is now, and what time it is"
BEFORE=$(sql live "SELECT count(*) || ' accounts, balance ' || sum(abalance) FROM pgbench_accounts")
NOW=$(sql live "SELECT clock_timestamp() AT TIME ZONE 'UTC' || '+00'")
echo "$NOW: $BEFORE"
sleep 1

say "4. The disaster"
sql live "DROP TABLE pgbench_accounts"
sql live "CREATE TABLE after_the_disaster AS SELECT 1"
echo "DROP TABLE pgbench_accounts;"
sql live "SELECT pg_switch_wal()" >/dev/null

say "5. Back to the second before"
segments() { [[ $(sql live "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'") == 0 ]]; }
wait_until 200 segments
run pgsidecar restore run --to "$WORK/restored" --target-time "$NOW"
start "$WORK/restored.log" postgres -D "$WORK/restored" -c archive_mode=off -c "unix_socket_directories=$WORK/side"
promoted() { [[ $(sql side "SELECT pg_is_in_recovery()") == f ]]; }
wait_until 300 promoted
AFTER=$(sql side "SELECT count(*) || ' accounts, balance ' || sum(abalance) FROM pgbench_accounts")
LATER=$(sql side "SELECT to_regclass('after_the_disaster') IS NULL")

say "6. The proof"
echo "before the disaster   $BEFORE"
echo "in the restored one   $AFTER"
grep -o 'recovery stopping.*\|last completed transaction was.*' "$WORK/restored.log" || true
[[ $BEFORE == "$AFTER" ]] || die "they differ"
[[ $LATER == t ]] || die "the restored database holds what was written after the target"
printf '\nEqual. %s s in all.\n' "$((SECONDS - BEGAN))"
