#!/usr/bin/env bash
# PostgreSQL 17 on Debian 12: the binaries of Debian 13 with their own C library, in a folder, run directly and as any user.
#
# PostgreSQL finds its other files relative to its binary. The paths of its libraries are absolute: the folder can't be moved.
source "$(dirname "$0")/lib.sh"

works() { [[ -e $1/../../../../../checked && $("$1/postgres" --version 2>/dev/null) == "postgres (PostgreSQL) 17."* ]]; }

if [[ -n ${PG_BIN_17:-} ]]; then
    [[ -x $PG_BIN_17/initdb ]] || die "PG_BIN_17 is set, but there is no $PG_BIN_17/initdb"
    exit 0
fi
works "$(pg_bin_17)" && exit
need_root_or_explain "PostgreSQL 17" "$ROOT/scripts/setup-postgres17.sh   (or set PG_BIN_17 to the folder of your own binaries)"
apt_install postgresql-common debootstrap patchelf # postgresql-common brings the user postgres and the time zones
lock postgresql-17
works "$(pg_bin_17)" && exit

dest=$TOOLS/postgresql-17
tmp=$dest.tmp
remove_debian_root "$dest"

log "fetching PostgreSQL 17 from Debian 13 (once; some two minutes; it goes to $dest)"
debian_root trixie "$tmp" postgresql-17

# Only PostgreSQL and the libraries are needed, and of those neither the JIT compiler (a server without it just doesn't use it) nor Perl.
find "$tmp" -xdev -mindepth 1 -maxdepth 1 ! -name usr ! -name lib ! -name lib64 -exec rm -rf --one-file-system {} +
find "$tmp/usr" -mindepth 1 -maxdepth 1 ! -name lib ! -name lib64 ! -name share -exec rm -rf {} +
find "$tmp/usr/share" -mindepth 1 -maxdepth 1 ! -name postgresql -exec rm -rf {} +
find "$tmp/usr/lib" -mindepth 1 -maxdepth 1 ! -name postgresql ! -name '*-linux-gnu*' ! -name 'ld-linux*' -exec rm -rf {} +
rm -rf "$tmp"/usr/lib/postgresql/17/lib/{bitcode,llvmjit*} "$tmp"/usr/share/postgresql/17/man \
    "$tmp"/usr/lib/*-linux-gnu/{libLLVM*,libz3*,perl*,libperl*}

use_own_libraries "$tmp" "$dest" "$tmp"/usr/lib/postgresql/17/bin/*
mv "$tmp" "$dest"

# Does it run? As postgres, from the folder where it stays: a database with all that initdb loads (plpgsql, the dictionaries, ...).
try=$(as_postgres mktemp -d)
trap 'rm -rf "$try"' EXIT
if ! (cd / && as_postgres "$(pg_bin_17)/initdb" -D "$try/data" --auth=trust --locale=C.UTF-8 </dev/null >"$try.log" 2>&1); then
    cat "$try.log" >&2
    die "PostgreSQL 17 was unpacked to $dest, but its initdb doesn't run here"
fi
rm -f "$try.log"
touch "$dest/checked"
