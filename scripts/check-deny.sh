#!/usr/bin/env bash
# Licences, bans and sources of all dependencies (deny.toml), and, where it can be reached, the database of security advisories.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

scripts/setup-deny.sh
deny=$(cargo_deny)
"$deny" --all-features --locked check --hide-inclusion-graph bans licenses sources
if output=$("$deny" --locked fetch db </dev/null 2>&1); then
    "$deny" --all-features --locked check --disable-fetch advisories
else
    tail -n 1 <<<"$output" >&2
    echo "NOT CHECKED: security advisories (their database can't be reached from this machine)"
fi
