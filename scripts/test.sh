#!/usr/bin/env bash
# `make test` and `make test-garage`: sets up what the tests need, builds, runs them all, and says what could not run here.
#
#   test.sh            everything, with s3s-fs as the S3 server
#   test.sh garage     the store and integration tests again, with Garage
#
# An integration test that needs a part which a machine may lack has that part in its name (the module's name counts): pg15, pg17,
# awscli, root_. Where a part is missing its tests are left out by that name, counted, and named at the end. With CI=true anything missing is an
# error. PGSIDECAR_TEST_WITHOUT=pg15,pg17 leaves parts out on purpose. An integration test of one S3 server only has s3s or garage in its
# name, and belongs to that run alone.
#
# What the tests may rely on:
#   PG_BIN_15, PG_BIN_17     folders with PostgreSQL's binaries
#   S3S_FS | GARAGE          the S3 server's binary (Garage is started by scripts/garage.sh)
#   PGSIDECAR_TEST_STORE     s3s or garage
#   PGSIDECAR_TEST_USER      the user that servers and the daemon run as; set only when the tests run as root
#   PGSIDECAR_TEST_WITHOUT   what is missing, comma-separated; empty when nothing is
#   PGSIDECAR_WAL            the helper `pgsidecar-wal`, built
#   TMPDIR                   a folder on a disk that every user can reach; removed when all is well
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

store=${1:-s3s}
case $store in
s3s)
    selection=(--workspace)
    other_run="(binary(store) + binary(it)) & test(garage)"
    ;;
garage)
    selection=(-p pgsidecar --test store --test it)
    other_run="(binary(store) + binary(it)) & test(s3s)"
    ;;
*) die "usage: test.sh [garage]" ;;
esac

# Set-up. without: the parts that this machine lacks.
without=()
IFS=, read -ra chosen <<<"${PGSIDECAR_TEST_WITHOUT:-}"
for part in "${chosen[@]}"; do
    case $part in
    pg15 | pg17 | awscli | root) without+=("$part") ;;
    *) die "PGSIDECAR_TEST_WITHOUT: there is no part '$part' (pg15, pg17, awscli, root)" ;;
    esac
done
lacks() { [[ " ${without[*]} " == *" $1 "* ]]; }
set_up() { # set_up PART SCRIPT
    local status=0
    lacks "$1" && return
    "scripts/$2" || status=$?
    case $status in
    0) ;;
    "$EXIT_NEEDS_ROOT") without+=("$1") ;;
    *) die "scripts/$2 failed" ;;
    esac
}
set_up pg15 setup-postgres.sh
set_up pg17 setup-postgres17.sh
set_up awscli setup-awscli.sh
if [[ $store == garage ]]; then
    scripts/setup-garage.sh
else
    scripts/setup-s3s.sh
fi
scripts/setup-nextest.sh
[[ $EUID -eq 0 ]] || lacks root || without+=(root)
if [[ ${CI:-} == true && ${#without[@]} -gt 0 ]]; then
    die "CI runs everything, but these are missing: ${without[*]}"
fi

make_tools_dir
mkdir -p "$TOOLS/tmp"
find "$TOOLS/tmp" -mindepth 1 -maxdepth 1 -mtime +1 -exec rm -rf {} + # of runs that failed
TMPDIR=$(mktemp -d "$TOOLS/tmp/XXXXXX")
PGSIDECAR_TEST_WITHOUT=$(
    IFS=,
    echo "${without[*]}"
)
export TMPDIR PGSIDECAR_TEST_WITHOUT PGSIDECAR_TEST_STORE=$store
if ! lacks pg15; then
    PG_BIN_15=$(pg_bin_15)
    export PG_BIN_15
fi
if ! lacks pg17; then
    PG_BIN_17=$(pg_bin_17)
    export PG_BIN_17
fi
if [[ $store == garage ]]; then
    GARAGE=$(garage)
    export GARAGE
else
    S3S_FS=$(s3s_fs)
    export S3S_FS
fi
PATH=$PATH:$(nextest_dir)

if [[ $EUID -eq 0 ]]; then
    export PGSIDECAR_TEST_USER=postgres
    chmod 1777 "$TMPDIR"
    if ! as_postgres test -x "${CARGO_TARGET_DIR:-$ROOT}"; then
        export CARGO_TARGET_DIR=$TOOLS/target
        log "the user postgres can't reach this checkout; building in $CARGO_TARGET_DIR"
    fi
fi
export PGSIDECAR_WAL=${CARGO_TARGET_DIR:-$ROOT/target}/debug/pgsidecar-wal

# shellcheck disable=SC2317 # the trap calls it
finish() {
    local status=$? toml
    # A test that was killed could not stop its server.
    while read -r toml; do
        scripts/garage.sh stop "${toml%/*}"
    done < <(find "$TMPDIR" -name garage.toml 2>/dev/null)
    if [[ $status -eq 0 ]]; then
        rm -rf "$TMPDIR"
    else
        log "what the failed tests left is in $TMPDIR"
    fi
}
trap finish EXIT

log "building"
cargo build --workspace --bins --tests --locked

failed=0
if [[ $store == s3s ]]; then
    log "documentation's examples"
    cargo test --doc --workspace --locked --quiet || failed=1
fi

# The tests of what is missing, as a filter; kind(test) is integration tests, only these need anything.
missing_tests="none()"
for part in "${without[@]}"; do
    [[ $part == root ]] && part=root_
    missing_tests+=" + (kind(test) & test($part))"
done
profile=default
[[ ${CI:-} == true ]] && profile=ci

log "tests${without[*]:+ (without: ${without[*]})}"
cargo nextest run --profile "$profile" "${selection[@]}" --locked -E "not ($missing_tests + ($other_run))" || failed=1

# report TITLE NEXTEST-LIST-OPTIONS...: counts and names these tests; fails when there are none.
report() {
    local title=$1 tests
    shift
    tests=$(cargo nextest list -T oneline "${selection[@]}" --locked "$@" 2>/dev/null)
    [[ -n $tests ]] || return
    printf '%s\n' "$title: $(wc -l <<<"$tests") tests:" "  ${tests//$'\n'/$'\n'  }"
}
report "Left to the run with the other S3 server" --run-ignored all -E "$other_run" && others=" other" || others=
complete=true
report "NOT RUN, this machine lacks ${without[*]}" --run-ignored all -E "($missing_tests) - ($other_run)" && complete=false
report "NOT RUN, marked #[ignore]" --run-ignored only -E "not ($missing_tests + ($other_run))" && complete=false
if [[ $complete == true ]]; then
    echo "Every$others test was run."
elif [[ ${CI:-} == true ]]; then
    echo "error: CI runs every test"
    failed=1
fi
exit "$failed"
