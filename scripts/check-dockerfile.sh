#!/usr/bin/env bash
# What can be told of the Dockerfile without building it: that it has the Rust of rust-toolchain.toml, and knows every package of the workspace.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

failed=0
complain() { echo "error: $*" >&2 && failed=1; }

channel=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
grep -q "^ARG RUST=.*rust:$channel-" Dockerfile || complain "the Dockerfile's Rust is not $channel, which rust-toolchain.toml names"

for package in $(sed -n 's/^members = \[\(.*\)\]/\1/p' Cargo.toml | tr -d '",'); do
    grep -q "^COPY $package/Cargo.toml $package/\$" Dockerfile || complain "the Dockerfile doesn't copy $package/Cargo.toml before the dependencies are built"
    grep -Eq "for package in .*[ ]${package}[ ;]" Dockerfile || complain "the Dockerfile makes no stub of $package"
    grep -qxF "!${package%%/*}" .dockerignore || complain ".dockerignore keeps $package out"
done
# The first step has manifests and no sources: targets that are only looked for where they usually are would fail it.
for manifest in Cargo.toml */Cargo.toml crates/*/Cargo.toml; do
    awk '/^\[/ { if (target && !path) exit 1; target = /^\[\[/; path = 0 } /^path = / { path = 1 } END { if (target && !path) exit 1 }' "$manifest" ||
        complain "$manifest has a test or bench without a path"
done
[[ $failed -eq 0 ]] && echo "Dockerfile ok"
exit "$failed"
