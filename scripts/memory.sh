#!/usr/bin/env bash
# `make memory`: backup and restore of a large data directory (2 GB) with daemon and restore held to 128 MiB, and their peaks.
#
# They are held by RLIMIT_DATA (private writable memory) and, where a memory cgroup can be made (root, cgroup v1 or v2), by that as well:
# there the page cache of what they read and write counts too, is reclaimed at the limit, and nothing may be killed.
#
# Of each row 1/COMPRESSIBLE is random, so that a large run (SIZE_MB=20480 COMPRESSIBLE=4) needs little more disk than the database twice; of
# those, what is above the first 2 GB is loaded without WAL.
#
#   SIZE_MB=2048 COMPRESSIBLE=1 LIMIT_MB=128 STORE=s3|directory scripts/memory.sh
source "$(dirname "$0")/lib.sh"

SIZE_MB=${SIZE_MB:-2048}
LIMIT_MB=${LIMIT_MB:-128}
COMPRESSIBLE=${COMPRESSIBLE:-1}
STORE=${STORE:-s3}
BIN=$(pg_bin_15)
[[ -x $BIN/initdb ]] || die "no PostgreSQL at $BIN: scripts/setup-postgres.sh installs it"
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}/release
[[ -x $TARGET/pgsidecar ]] || die "no $TARGET/pgsidecar: cargo build --release makes it"
WORK=$(mktemp -d "${TMPDIR:-/tmp}/pgsidecar-memory.XXXXXX")
PIDS=()
CGROUPS=()

cleanup() {
    local status=$?
    set +e
    for name in data restored; do
        [[ -d $WORK/$name ]] && run pg_ctl -D "$WORK/$name" -m immediate stop >/dev/null 2>&1
    done
    # What was started through `run` is the child of a subshell, which alone would be ended.
    for pid in "${PIDS[@]}"; do
        pkill -TERM -P "$pid" 2>/dev/null
        kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    for group in "${CGROUPS[@]}"; do rmdir "$group" 2>/dev/null; done
    if [[ $status -eq 0 ]]; then rm -rf "$WORK"; else echo "It failed; what is left is in $WORK" >&2; fi
    exit "$status"
}
trap cleanup EXIT

run() {
    if [[ $EUID -eq 0 ]]; then as_postgres env PATH="$BIN:$WORK/bin:/usr/bin:/bin" "$@"; else PATH="$BIN:$WORK/bin:$PATH" "$@"; fi
}
sql() { run psql -X -q -A -t -v ON_ERROR_STOP=1 -h "$WORK/$1" -d postgres -c "$2"; }

# cgroup NAME: makes a memory cgroup with the limit; prints its folder, or nothing where none can be made.
cgroup() {
    local group
    if [[ -w /sys/fs/cgroup/memory/memory.limit_in_bytes ]]; then
        group=/sys/fs/cgroup/memory/pgsidecar-$1-$$
        mkdir "$group" 2>/dev/null || return 0
        echo $((LIMIT_MB << 20)) >"$group/memory.limit_in_bytes" || return 0
    elif grep -qw memory /sys/fs/cgroup/cgroup.subtree_control 2>/dev/null; then
        group=/sys/fs/cgroup/pgsidecar-$1-$$
        mkdir "$group" 2>/dev/null || return 0
        echo $((LIMIT_MB << 20)) >"$group/memory.max" || return 0
        echo 0 >"$group/memory.swap.max" 2>/dev/null || true
    else
        return 0
    fi
    echo "$group"
}
oom_kills() {
    { cat "$1/memory.oom_control" "$1/memory.events" 2>/dev/null || true; } | awk '$1 == "oom_kill" { n += $2 } END { print n + 0 }'
}
# The figures of a group: how often it met its limit, and the most that it held.
group_figures() {
    local peak
    peak=$({ cat "$1/memory.max_usage_in_bytes" "$1/memory.peak" 2>/dev/null || true; } | head -n 1)
    echo "cgroup peak with page cache $((${peak:-0} >> 20)) MiB, OOM kills $(oom_kills "$1")"
}

# limited NAME LOG COMMAND...: in the background, held to the limit; its pid is in $LAST, its cgroup in $GROUP.
limited() {
    local name=$1 log=$2
    shift 2
    GROUP=$(cgroup "$name")
    [[ -n $GROUP ]] && CGROUPS+=("$GROUP")
    (
        [[ -n $GROUP ]] && echo "$BASHPID" >"$GROUP/cgroup.procs"
        if [[ $EUID -eq 0 ]]; then
            exec prlimit --data=$((LIMIT_MB << 20)) setpriv --reuid=postgres --regid=postgres --clear-groups "$@"
        fi
        exec prlimit --data=$((LIMIT_MB << 20)) "$@"
    ) >"$log" 2>&1 &
    LAST=$!
}
# watch PID FILE: the peaks of RssAnon and VmHWM in kB, sampled every 50 ms while the process lives.
watch() {
    awk -v pid="$1" -v out="$2" 'BEGIN {
        file = "/proc/" pid "/status"
        while (1) {
            found = 0
            while ((getline line < file) > 0) {
                split(line, part, /[ \t]+/)
                if (part[1] == "RssAnon:") { found = 1; if (part[2] + 0 > anon) anon = part[2] + 0 }
                if (part[1] == "VmHWM:" && part[2] + 0 > resident) resident = part[2] + 0
            }
            close(file)
            if (!found) break
            printf "%d %d\n", resident, anon > out
            close(out)
            system("sleep 0.05")
        }
    }' &
    PIDS+=($!)
}
figures() {
    local resident anon
    read -r resident anon <"$1"
    echo "VmHWM $((resident >> 10)) MiB, RssAnon $((anon >> 10)) MiB"
}

mkdir "$WORK/bin" "$WORK/live" "$WORK/side"
cp "$TARGET/pgsidecar" "$TARGET/pgsidecar-wal" "$WORK/bin/"
chmod 755 "$WORK"
if [[ $EUID -eq 0 ]]; then chown -R postgres:postgres "$WORK"; fi
cd "$WORK"

export PGDATA=$WORK/data PGHOST=$WORK/live PGUSER PGSIDECAR_CONTROL_SOCKET=$WORK/control.sock PGSIDECAR_SPOOL=$WORK/spool
PGUSER=$(run id -un)
export PGSIDECAR_WAL_LISTEN PGSIDECAR_HEALTH_LISTEN=127.0.0.1:0 HOME=$WORK
PGSIDECAR_WAL_LISTEN=127.0.0.1:$(free_port)
export PGSIDECAR_HELPER=$WORK/bin/pgsidecar-wal
unset PGSIDECAR_CLUSTER PGDATABASE PGPORT PGPASSFILE
case $STORE in
directory) export PGSIDECAR_REPOSITORY=file://$WORK/repository ;;
s3)
    S3_PORT=$(free_port)
    run mkdir -p "$WORK/s3/backups"
    run "$(s3s_fs)" --host 127.0.0.1 --port "$S3_PORT" --access-key memory --secret-key memorysecret "$WORK/s3" >"$WORK/s3.log" 2>&1 &
    PIDS+=($!)
    wait_until 50 bash -c "exec 3<>/dev/tcp/127.0.0.1/$S3_PORT"
    export PGSIDECAR_REPOSITORY=s3://backups/memory AWS_ENDPOINT_URL_S3=http://127.0.0.1:$S3_PORT AWS_REGION=us-east-1
    export AWS_ACCESS_KEY_ID=memory AWS_SECRET_ACCESS_KEY=memorysecret
    ;;
*) die "STORE=$STORE: s3 or directory" ;;
esac

run initdb -D "$PGDATA" -A trust --no-sync >"$WORK/initdb.log"
cat >>"$PGDATA/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$WORK/live'
archive_mode = on
archive_command = '$WORK/bin/pgsidecar-wal --address $PGSIDECAR_WAL_LISTEN archive %p'
max_wal_size = 4GB
fsync = off
CONF
# load TABLE MEGABYTES: rows of 8 kB into a table of its own. Where wal_level is minimal, a table that its own transaction makes needs no WAL.
load() {
    local row=$((8192 / COMPRESSIBLE)) chunk inserts=
    for chunk in $(seq "$(($2 / 64))"); do
        run head -c $((row * 8192)) /dev/urandom >"$WORK/random.$chunk"
        chmod 644 "$WORK/random.$chunk"
        inserts+="INSERT INTO $1 SELECT n, repeat_bytes(pg_read_binary_file('$WORK/random.$chunk', n * $row, $row)) FROM generate_series(0, 8191) n;"
    done
    sql live "BEGIN; CREATE TABLE $1 (n int, b bytea); ALTER TABLE $1 ALTER b SET STORAGE EXTERNAL; $inserts COMMIT"
    rm "$WORK"/random.*
}
start() { run pg_ctl -D "$PGDATA" -w -t 300 -l "$WORK/postgres.log" "$@" start >/dev/null; }

log "writing a database of $SIZE_MB MB"
start -o "-c wal_level=minimal -c archive_mode=off -c max_wal_senders=0"
# What is repeated is the whole row, each time: zstd finds it within the 8 kB, PostgreSQL doesn't look (STORAGE EXTERNAL).
BYTES=\$1
for _ in $(seq 2 "$COMPRESSIBLE"); do BYTES+=" || \$1"; done
sql live "CREATE FUNCTION repeat_bytes(bytea) RETURNS bytea LANGUAGE sql IMMUTABLE AS \$\$ SELECT $BYTES \$\$"
ARCHIVED_MB=$((SIZE_MB < 2048 ? SIZE_MB : 2048))
TABLES=()
for n in $(seq $(((SIZE_MB - ARCHIVED_MB) / 1024))); do
    load "t$n" 1024
    TABLES+=("t$n")
done
run pg_ctl -D "$PGDATA" -w -t 300 stop >/dev/null
start
limited daemon "$WORK/sidecar.log" "$WORK/bin/pgsidecar" run
DAEMON=$LAST DAEMON_GROUP=$GROUP
PIDS+=("$DAEMON")
watch "$DAEMON" "$WORK/daemon.peak"
wait_until 100 run pgsidecar status

log "writing its last $ARCHIVED_MB MB; their WAL is archived meanwhile"
for n in $(seq $((ARCHIVED_MB / 256))); do
    load "a$n" 256
    TABLES+=("a$n")
done
content() { for table in "${TABLES[@]}"; do sql "$1" "SELECT count(*), sum(hashtext(b::text)::bigint) FROM $table"; done; }
EXPECTED=$(content live)
archived() { [[ $(sql live "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'") == 0 ]]; }
wait_until 3000 archived
echo "archiving  daemon:  $(figures "$WORK/daemon.peak")"

log "base backup"
began=$SECONDS
run pgsidecar backup create --fast
echo "backup     daemon:  $(figures "$WORK/daemon.peak"), $((SECONDS - began)) s"
sql live "SELECT pg_switch_wal()" >/dev/null
wait_until 3000 archived

log "restore"
began=$SECONDS
limited restore "$WORK/restore.log" "$WORK/bin/pgsidecar" restore run --to "$WORK/restored"
watch "$LAST" "$WORK/restore.peak"
wait "$LAST" || die "the restore failed: $(cat "$WORK/restore.log")"
echo "restore    command: $(figures "$WORK/restore.peak"), $((SECONDS - began)) s"
RESTORE_GROUP=$GROUP

run postgres -D "$WORK/restored" -c archive_mode=off -c "unix_socket_directories=$WORK/side" >"$WORK/restored.log" 2>&1 &
promoted() { [[ $(sql side "SELECT pg_is_in_recovery()") == f ]]; }
wait_until 1200 promoted
[[ $(content side) == "$EXPECTED" ]] || die "the restored database differs"
echo "recovery   daemon:  $(figures "$WORK/daemon.peak")"
kill -0 "$DAEMON" || die "the daemon did not survive"

killed=0
for group in "$DAEMON_GROUP" "$RESTORE_GROUP"; do
    [[ -n $group ]] || continue
    echo "$(basename "$group"): $(group_figures "$group")"
    killed=$((killed + $(oom_kills "$group")))
done
[[ -n $DAEMON_GROUP ]] || echo "no memory cgroup can be made here: held by RLIMIT_DATA alone"
[[ $killed -eq 0 ]] || die "the OOM killer came"
for peak in daemon restore; do
    read -r _ anon <"$WORK/$peak.peak"
    [[ $anon -lt $((LIMIT_MB << 10)) ]] || die "$peak: too much"
done
echo "Equal, within $LIMIT_MB MiB."
