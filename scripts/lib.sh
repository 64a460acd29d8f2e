# shellcheck shell=bash
# Shared by the scripts of this folder: sourced, never run.
#
# What the project's tests need beyond cargo (servers, cargo-deny, ...) is kept in one folder outside the checkout, $TOOLS, so that several
# checkouts share it. It must be reachable for the user postgres: servers refuse to run as root, so root's tests start them as that user.

set -euo pipefail
umask 022

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SHARED_TOOLS=/var/cache/pgsidecar-dev
if [[ -n ${PGSIDECAR_TOOLS:-} ]]; then
    TOOLS=$PGSIDECAR_TOOLS
elif [[ $EUID -eq 0 ]]; then
    TOOLS=$SHARED_TOOLS
else
    TOOLS=$HOME/.cache/pgsidecar-dev
fi

# The versions of everything that we fetch by ourselves. Debian's packages are whatever Debian has.
S3S_FS_VERSION=0.14.1
GARAGE_VERSION=2.5.0
CARGO_DENY_VERSION=0.20.2
CARGO_NEXTEST_VERSION=0.9.143
KUBERNETES_VALIDATE_VERSION=1.37.0
KUBECTL_MINOR=1.27 # the first whose kustomize is version 5

# Exit status of a set-up script that only lacks the rights: the caller may go on without that part. Any other failure is a failure.
EXIT_NEEDS_ROOT=3

log() { printf '%s\n' "== $*" >&2; }

die() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

# free_port: a port of the loopback interface that nobody listens on, below those that the kernel gives out.
free_port() {
    local port
    for _ in $(seq 100); do
        port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
    done
    die "no free port found"
}
# wait_until TRIES COMMAND...: tries it ten times a second until it succeeds.
wait_until() {
    local tries=$1
    shift
    for _ in $(seq "$tries"); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
    die "this did not come true: $*"
}

# need_root_or_explain WHAT COMMAND: returns for root, otherwise tells what to do and exits.
need_root_or_explain() {
    [[ $EUID -eq 0 ]] && return
    printf '%s\n' "missing: $1" "  this needs root; once:  $2" >&2
    exit "$EXIT_NEEDS_ROOT"
}

as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }

# Makes $TOOLS, and says so now, rather than in every test, when postgres can't get there.
make_tools_dir() {
    mkdir -p "$TOOLS"
    [[ $EUID -eq 0 ]] || return 0
    chmod 755 "$TOOLS"
    if getent passwd postgres >/dev/null && ! as_postgres test -x "$TOOLS"; then
        die "the user postgres can't reach $TOOLS; set PGSIDECAR_TOOLS to a folder that every user can enter"
    fi
}

# One set-up of a kind at a time, also across checkouts. Held until the script exits.
lock() {
    make_tools_dir
    exec 9>"$TOOLS/.lock-$1"
    flock 9
}

# tool_dir NAME: where NAME is, or is to be made. Unless a folder was asked for, a user's tests also find what root has set up for all.
tool_dir() {
    if [[ -z ${PGSIDECAR_TOOLS:-} && ! -e $TOOLS/$1 && -e $SHARED_TOOLS/$1 ]]; then
        echo "$SHARED_TOOLS/$1"
    else
        echo "$TOOLS/$1"
    fi
}

# Where each part is; the variables of the same names override (they are also what the tests read).
pg_bin_15() { echo "${PG_BIN_15:-/usr/lib/postgresql/15/bin}"; }
pg_bin_17() { echo "${PG_BIN_17:-$(tool_dir postgresql-17)/usr/lib/postgresql/17/bin}"; }
s3s_fs() { echo "${S3S_FS:-$(tool_dir "s3s-fs-$S3S_FS_VERSION")/bin/s3s-fs}"; }
garage() { echo "${GARAGE:-$(tool_dir "garage-$GARAGE_VERSION")/bin/garage}"; }
# PostgreSQL and other tools of `make bench`, from Debian: see setup-bench.sh.
BENCH_POSTGRES=18 # benches/compare/run.rs has it too
bench_root() { echo "${PGSIDECAR_BENCH_ROOT:-$(tool_dir bench)}"; }
pg_bin_18() { echo "${PG_BIN_18:-$(bench_root)/usr/lib/postgresql/$BENCH_POSTGRES/bin}"; }
nextest_dir() { echo "$(tool_dir "cargo-nextest-$CARGO_NEXTEST_VERSION")/bin"; }
# For `make manifests`.
promtool() { echo "${PROMTOOL:-$(tool_dir promtool)/promtool}"; }
kubernetes_schemas() { tool_dir "kubernetes-validate-$KUBERNETES_VALIDATE_VERSION"; }
kubectl_for_manifests() {
    local installed
    installed=$(command -v kubectl) && has_kustomize "$installed" && echo "$installed" && return
    echo "$(tool_dir kubectl)/usr/bin/kubectl"
}
# has_kustomize KUBECTL: whether it is new enough.
has_kustomize() {
    local version
    version=$("$1" version --client 2>/dev/null | sed -n 's/^Client Version: v\([0-9]*\.[0-9]*\).*/\1/p')
    [[ -n $version && $(printf '%s\n' "$KUBECTL_MINOR" "$version" | sort -V | head -n 1) == "$KUBECTL_MINOR" ]]
}
cargo_deny() { echo "$(tool_dir "cargo-deny-$CARGO_DENY_VERSION")/bin/cargo-deny"; }

# apt_install PACKAGE...: installs those that are missing.
apt_install() {
    local package missing=()
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    command -v apt-get >/dev/null || die "this is not Debian: install these by hand: ${missing[*]}"
    need_root_or_explain "${missing[*]}" "apt-get install --no-install-recommends ${missing[*]}"
    lock apt
    log "installing ${missing[*]}"
    apt-get update -qq </dev/null || log "apt-get update had errors; going on with the lists that there are"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >"$TOOLS/apt.log"
}

# install_crate NAME VERSION BINARY [cargo install's options]: into $TOOLS/NAME-VERSION, complete or not at all.
install_crate() {
    local name=$1 version=$2 binary=$3
    shift 3
    [[ -x $(tool_dir "$name-$version")/bin/$binary ]] && return
    lock "$name"
    local dest=$TOOLS/$name-$version
    [[ -x $dest/bin/$binary ]] && return
    log "building $name $version (once; it goes to $dest)"
    rm -rf "$dest" "$dest.tmp"
    # In the project's folder, for its pinned toolchain.
    (cd "$ROOT" && nice cargo install "$name" --version "=$version" --locked --root "$dest.tmp" --target-dir "$dest.tmp/build" "$@" </dev/null >&2)
    rm -rf "$dest.tmp/build"
    mv "$dest.tmp" "$dest"
}

# debian_root SUITE DIRECTORY PACKAGE,...: the files of a Debian with these packages, without having installed it. Needs root.
debian_root() {
    local suite=$1 dest=$2 packages=$3 mirror log_file
    # Debian's mirror as this machine's own apt knows it.
    # shellcheck disable=SC2016 # apt's own fields, not the shell's
    mirror=$(apt-get indextargets --format '$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "Debian" && $3 == "main" { print $4; exit }')
    mirror=${PGSIDECAR_DEBIAN_MIRROR:-${mirror:-http://deb.debian.org/debian}}
    remove_debian_root "$dest"
    log_file=${dest%.tmp}.log
    if ! debootstrap --variant=minbase --include="$packages" "$suite" "$dest" "$mirror" </dev/null >"$log_file" 2>&1; then
        tail -n 20 "$log_file" "$dest/debootstrap/debootstrap.log" >&2 || true
        die "debootstrap failed; all of its output is in $log_file"
    fi
    umount "$dest/proc" "$dest/sys" 2>/dev/null || true
}

remove_debian_root() {
    umount "$1/proc" "$1/sys" 2>/dev/null || true # left behind by a debootstrap that was killed
    rm -rf --one-file-system "$1"
}

# use_own_libraries ROOT DEST EXECUTABLE...: that executables of a Debian in ROOT run outside of it, when it has been moved to DEST: each is
# told (patchelf) to use that folder's loader and libraries. Modules that they load take their libraries from the executable's rpath.
use_own_libraries() {
    local root=$1 dest=$2 libraries interpreter binary
    shift 2
    libraries=$(cd "$root" && echo usr/lib/*-linux-gnu)
    for binary in "$@"; do
        interpreter=$(patchelf --print-interpreter "$binary" 2>/dev/null) || continue # a script
        [[ $interpreter != "$dest"/* ]] || continue # one file by two names
        interpreter=$(realpath "$root$interpreter")
        patchelf --set-interpreter "$dest/${interpreter#"$root"/}" --force-rpath --set-rpath "$dest/$libraries" "$binary"
    done
}
