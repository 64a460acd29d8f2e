#!/usr/bin/env bash
# What `make bench` compares with and measures on: PostgreSQL 18, pgBackRest, barman-cloud, nginx (for TLS before the S3 server) and zstd, in
# a folder, run directly and as any user. From Debian unstable: a comparison should be with what is new, and Debian stable's pgBackRest and
# Barman are years old in its last year. All tools get the same PostgreSQL.
source "$(dirname "$0")/lib.sh"

works() { [[ -e $1/checked && -x $1/usr/lib/postgresql/$BENCH_POSTGRES/bin/initdb ]]; }

if [[ -n ${PGSIDECAR_BENCH_ROOT:-} ]]; then
    [[ -x $PGSIDECAR_BENCH_ROOT/usr/lib/postgresql/$BENCH_POSTGRES/bin/initdb ]] ||
        die "PGSIDECAR_BENCH_ROOT is set, but there is no PostgreSQL $BENCH_POSTGRES under $PGSIDECAR_BENCH_ROOT/usr/lib/postgresql"
    exit 0
fi
if [[ $EUID -eq 0 ]]; then
    apt_install openssl
else
    command -v openssl >/dev/null || die "openssl is missing"
fi
works "$(bench_root)" && exit
need_root_or_explain "what is compared with" "$ROOT/scripts/setup-bench.sh"
apt_install postgresql-common debootstrap patchelf # postgresql-common brings the user postgres and the time zones
lock bench
works "$(bench_root)" && exit

dest=$TOOLS/bench
tmp=$dest.tmp
remove_debian_root "$dest"
log "fetching PostgreSQL $BENCH_POSTGRES, pgBackRest, barman-cloud and nginx from Debian unstable (once; some three minutes; it goes to $dest)"
debian_root sid "$tmp" "postgresql-$BENCH_POSTGRES,pgbackrest,barman-cli-cloud,python3-boto3,python3-zstandard,nginx,zstd"

find "$tmp" -xdev -mindepth 1 -maxdepth 1 ! -name usr ! -name lib ! -name lib64 -exec rm -rf --one-file-system {} +
rm -rf "$tmp"/usr/share/{doc,man,locale,zoneinfo} "$tmp"/usr/lib/*-linux-gnu/{libLLVM*,libz3*}
rm -rf "$tmp/usr/lib/postgresql/$BENCH_POSTGRES"/lib/{bitcode,llvmjit*}
use_own_libraries "$tmp" "$dest" "$tmp/usr/lib/postgresql/$BENCH_POSTGRES"/bin/* \
    "$tmp"/usr/bin/{pgbackrest,zstd} "$tmp"/usr/bin/python3.[0-9]* "$tmp"/usr/sbin/nginx
mv "$tmp" "$dest"

# Do they run? As postgres, from the folder where they stay.
try=$(as_postgres mktemp -d)
trap 'rm -rf "$try" "$try.log"' EXIT
runs() { # runs WHAT COMMAND...
    local what=$1
    shift
    (cd / && as_postgres "$@" </dev/null >"$try.log" 2>&1) || {
        cat "$try.log" >&2
        return 1
    }
    log "$what: $(tail -n 1 "$try.log")"
}
(cd / && as_postgres "$dest/usr/lib/postgresql/$BENCH_POSTGRES/bin/initdb" -D "$try/data" --auth=trust --locale=C.UTF-8 </dev/null >"$try.log" 2>&1) || {
    cat "$try.log" >&2
    die "PostgreSQL's initdb doesn't run here"
}
runs PostgreSQL "$dest/usr/lib/postgresql/$BENCH_POSTGRES/bin/postgres" --version || die "it doesn't run here"
runs pgBackRest "$dest/usr/bin/pgbackrest" version || die "it doesn't run here"
runs nginx "$dest/usr/sbin/nginx" -v || die "it doesn't run here"
runs zstd "$dest/usr/bin/zstd" --version || die "it doesn't run here"
runs barman-cloud "$dest/usr/bin/python3" "$dest/usr/bin/barman-cloud-wal-archive" --version ||
    log "barman-cloud doesn't run here; it is left out of the comparison"
touch "$dest/checked"
