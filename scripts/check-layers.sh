#!/usr/bin/env bash
# The layers of ARCHITECTURE.md, proved by the dependency lists (deny.toml can't say what one member of the workspace may not use).
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

failed=0

# dependencies PACKAGE: the names of all that PACKAGE is built with and from, itself left out.
dependencies() {
    cargo tree --locked --package "$1" --edges normal,build --target all --all-features --prefix none --format '{p}' |
        awk -v self="$1" '$1 != self { print $1 }' | sort -u
}

# must_not_use PACKAGE PATTERN WHY
must_not_use() {
    local all found
    all=$(dependencies "$1")
    found=$(grep -xE "$2" <<<"$all" || true)
    [[ -n $found ]] || return 0
    printf '%s\n' "error: $1 depends on: ${found//$'\n'/ }" "  $3" >&2
    failed=1
}

must_not_use pgsidecar-wal '.+' 'it starts in a millisecond and is copied into other images: standard library only'
must_not_use pgsidecar-core '(tokio|hyper|aws|futures|mio|notify|reqwest|rustls|async-std|smol|tracing)(-.+)?' \
    'the core is pure: no runtime, no network, no logging'
must_not_use pgsidecar-webhook '(aws|tokio-postgres|postgres)(-.+)?' 'the injector talks neither to a store nor to PostgreSQL'
[[ $failed -eq 0 ]] && echo "layers ok"
exit "$failed"
