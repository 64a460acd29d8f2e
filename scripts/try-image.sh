#!/usr/bin/env bash
# Tries a built image, with a read-only root file system, as the user 999 and without any rights:
#
#   scripts/try-image.sh [IMAGE]        [default: pgsidecar:VERSION]
#
# its programs answer; the daemon comes up and brings its helper to a volume; the helper runs where there is no C library at all; a real
# PostgreSQL on loopback is dumped, listed, restored into another database, and compared. At the end, sizes; too large is a failure.
#
# With buildah, docker or podman (BUILDER= chooses). buildah needs root and no container engine: the image's root is mounted and entered.
source "$(dirname "$0")/image-lib.sh"

IMAGE=${1:-pgsidecar:$(version)}
MAX_IMAGE_MB=120
MAX_SIDECAR_MB=25
BUILDER=$(find_builder)
BEGAN=$SECONDS
if [[ -x $(pg_bin_17)/initdb ]]; then BIN=$(pg_bin_17); else "$ROOT/scripts/setup-postgres.sh" && BIN=$(pg_bin_15); fi

WORK=$(mktemp -d "${TMPDIR:-/tmp}/pgsidecar-image.XXXXXX")
CONTAINER='' DAEMON=''
cleanup() {
    local status=$?
    set +e
    [[ -z $DAEMON ]] || stop_daemon
    [[ ! -d $WORK/data ]] || as_server "$BIN/pg_ctl" -D "$WORK/data" -m immediate stop >/dev/null 2>&1
    case $BUILDER in
    buildah) [[ -z $CONTAINER ]] || buildah rm "$CONTAINER" >/dev/null ;;
    *) [[ -z $CONTAINER ]] || "$BUILDER" rm --force "$CONTAINER" >/dev/null ;;
    esac
    if [[ $status -eq 0 ]]; then rm -rf --one-file-system "$WORK"; else echo "The trial failed; what it left is in $WORK" >&2; fi
    exit "$status"
}
trap cleanup EXIT

# PostgreSQL refuses to run as root.
as_server() { if [[ $EUID -eq 0 ]]; then as_postgres "$@"; else "$@"; fi; }

# The volume is at /mnt, and is all that can be written to.
SETTINGS=(TMPDIR=/mnt HOME=/mnt PGSIDECAR_REPOSITORY=file:///mnt/repository PGSIDECAR_CLUSTER=trial PGSIDECAR_CONTROL_SOCKET=/mnt/control.sock)
mkdir -p "$WORK/volume/repository" "$WORK/volume/helper" "$WORK/empty"
chmod -R a+rwX "$WORK/volume"
chmod 755 "$WORK"

case $BUILDER in
buildah)
    [[ $EUID -eq 0 ]] || die "with buildah this needs root (or: buildah unshare $0)"
    CONTAINER=$(buildah from --pull-never "$IMAGE")
    MOUNTED=$(buildah mount "$CONTAINER")
    # enter PROGRAM ARGUMENT...: becomes that, as the kubelet would start it. The mounts go with the process.
    enter() {
        # shellcheck disable=SC2016 # the inner shell expands it
        exec unshare --mount -- sh -euc '
            root=$1 volume=$2; shift 2
            mount --bind "$root" "$root"; mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"
            mount --bind "$volume" "$root/mnt"; mount -o remount,bind,ro "$root"
            exec env --ignore-environment PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"' \
            sh "$MOUNTED" "$WORK/volume" "${SETTINGS[@]}" \
            chroot "$MOUNTED" setpriv --reuid=999 --regid=999 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
    }
    in_image() { (enter "$@"); }
    start_daemon() { enter pgsidecar run >"$WORK/daemon.log" 2>&1 & DAEMON=$!; }
    stop_daemon() {
        local daemon=$DAEMON
        DAEMON=''
        kill "$daemon"
        wait "$daemon" || die "the daemon ended with $?: see $WORK/daemon.log"
    }
    get() { cp "$MOUNTED$1" "$2"; }
    size() { du --summarize --bytes --one-file-system "$MOUNTED" | cut -f 1; }
    configured() { buildah inspect --format "{{.OCIv1.Config.User}} {{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.Cmd}}" --type image "$IMAGE"; }
    ;;
*)
    RUN=(--read-only --cap-drop=ALL --security-opt=no-new-privileges --network=host --volume "$WORK/volume:/mnt")
    RUN+=("${SETTINGS[@]/#/--env=}")
    in_image() {
        local program=$1
        shift
        "$BUILDER" run --rm "${RUN[@]}" --entrypoint "$program" "$IMAGE" "$@"
    }
    # With its own entrypoint and command.
    start_daemon() { DAEMON=$("$BUILDER" run --detach --rm "${RUN[@]}" "$IMAGE"); }
    stop_daemon() { "$BUILDER" stop "$DAEMON" >/dev/null; DAEMON=''; }
    CONTAINER=$("$BUILDER" create "$IMAGE")
    get() { "$BUILDER" cp "$CONTAINER:$1" "$2"; }
    size() { "$BUILDER" image inspect --format '{{.Size}}' "$IMAGE"; }
    configured() { "$BUILDER" image inspect --format '{{.Config.User}} {{.Config.Entrypoint}} {{.Config.Cmd}}' "$IMAGE"; }
    ;;
esac

log "$IMAGE, with $BUILDER"
[[ $(configured) == '999:999 [pgsidecar] [run]' ]] || die "user, entrypoint and command are: $(configured)"
[[ $(in_image id -u) == 999 ]] || die "it doesn't run as 999"
in_image sh -c 'touch /mnt/written' || die "the volume can't be written to"
for place in / /run/pgsidecar /tmp /usr/local/bin; do
    ! in_image touch "$place/written" 2>/dev/null || die "$place can be written to: the root isn't read-only"
done
[[ $(in_image pgsidecar --version) == "pgsidecar $(version)" ]] || die "pgsidecar doesn't say version $(version)"
in_image pgsidecar-webhook --version >/dev/null || die "pgsidecar-webhook doesn't answer"
for program in pgsidecar pgsidecar-wal pgsidecar-webhook; do get "/usr/local/bin/$program" "$WORK/$program"; done
in_image pg_dump --version
glibc=$(readelf --version-info "$WORK/pgsidecar" | grep -o 'GLIBC_[0-9.]*' | sort --version-sort | tail -n 1)
[[ $(printf 'GLIBC_%s\n' 2.36 "${glibc#GLIBC_}" | sort --version-sort | tail -n 1) == GLIBC_2.36 ]] ||
    die "pgsidecar needs $glibc: it doesn't run in database images on Debian 12"
echo "pgsidecar runs from $glibc on"

log "the daemon, and its helper on the volume"
WAL_PORT=$(free_port)
SETTINGS+=("PGSIDECAR_WAL_LISTEN=127.0.0.1:$WAL_PORT" PGSIDECAR_HEALTH_LISTEN=127.0.0.1:0 PGSIDECAR_PUBLISH_HELPER=/mnt/helper)
[[ $BUILDER == buildah ]] || RUN+=("${SETTINGS[@]/#/--env=}")
start_daemon
HELPER=$WORK/volume/helper/pgsidecar-wal
wait_until 100 test -x "$HELPER"
cmp "$HELPER" "$WORK/pgsidecar-wal" || die "the helper on the volume isn't the image's"
wait_until 100 "$HELPER" --address "127.0.0.1:$WAL_PORT" ping
if [[ $EUID -eq 0 ]]; then
    # A root with nothing in it but the helper: what runs here runs in Alpine, and everywhere.
    cp "$HELPER" "$WORK/empty/"
    chroot "$WORK/empty" /pgsidecar-wal --address "127.0.0.1:$WAL_PORT" ping || die "the helper doesn't run without a C library"
    echo "the helper runs in an empty root"
else
    ! readelf --program-headers "$HELPER" | grep -q INTERP || die "the helper is not static"
    echo "the helper has no interpreter"
fi
in_image pgsidecar status >/dev/null || [[ $? -eq 1 ]] || die "pgsidecar status gets no answer"
stop_daemon

log "a PostgreSQL on loopback, with a password"
PORT=$(free_port)
install -d -m 755 "$WORK/run"
[[ $EUID -ne 0 ]] || chown postgres "$WORK" "$WORK/run"
echo 'a secret' >"$WORK/password"
chmod 644 "$WORK/password"
(cd / && as_server "$BIN/initdb" -D "$WORK/data" --username=postgres --auth=scram-sha-256 --pwfile="$WORK/password" --encoding=UTF8 --no-sync) >"$WORK/initdb.log"
(cd / && as_server "$BIN/pg_ctl" -D "$WORK/data" -w -l "$WORK/server.log" \
    -o "-c port=$PORT -c listen_addresses=127.0.0.1 -c unix_socket_directories=$WORK/run" start) >/dev/null
SETTINGS+=(PGHOST=127.0.0.1 "PGPORT=$PORT" PGUSER=postgres 'PGPASSWORD=a secret')
[[ $BUILDER == buildah ]] || RUN+=("${SETTINGS[@]/#/--env=}")
sql() { in_image psql -X -q -A -t -v ON_ERROR_STOP=1 -d "$1" -c "$2"; }
echo "server $(sql postgres 'SHOW server_version')"
sql postgres 'CREATE DATABASE shop'
sql shop "CREATE TABLE orders (id int PRIMARY KEY, what text, at timestamptz);
    INSERT INTO orders SELECT n, 'größer ' || md5(n::text), now() - n * interval '1 minute' FROM generate_series(1, 200000) n;
    CREATE INDEX ON orders (at); CREATE VIEW newest AS SELECT * FROM orders ORDER BY at DESC LIMIT 10"
content() { sql "$1" "SELECT count(*), md5(string_agg(o::text, E'\n' ORDER BY id)) FROM orders o"; }

DUMP_BEGAN=$SECONDS
in_image pgsidecar dump create --once
ID=$(in_image pgsidecar dump list | awk 'NR == 2 { print $1 }')
in_image pgsidecar dump list
[[ -n $ID ]] || die "the dump isn't listed"
in_image pgsidecar dump verify --deep
in_image pgsidecar dump restore "$ID" --database shop --into copy --create
BEFORE=$(content shop) AFTER=$(content copy)
[[ $BEFORE == "$AFTER" ]] || die "they differ: $BEFORE and $AFTER"
[[ $(sql copy 'SELECT count(*) FROM newest') == 10 ]] || die "the view isn't there"
echo "equal: $AFTER; dump, verify and restore took $((SECONDS - DUMP_BEGAN)) s"

log "sizes"
megabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f", bytes / 1e6 }'; }
for program in pgsidecar pgsidecar-webhook pgsidecar-wal; do
    printf '%-20s %8s MB\n' "$program" "$(megabytes "$(stat --format %s "$WORK/$program")")"
done
printf '%-20s %8s MB uncompressed\n' "the image" "$(megabytes "$(size)")"
[[ $(size) -le $((MAX_IMAGE_MB * 1000000)) ]] || die "the image has more than $MAX_IMAGE_MB MB"
[[ $(stat --format %s "$WORK/pgsidecar") -le $((MAX_SIDECAR_MB * 1000000)) ]] || die "pgsidecar has more than $MAX_SIDECAR_MB MB"
log "the image is right; $((SECONDS - BEGAN)) s in all"
