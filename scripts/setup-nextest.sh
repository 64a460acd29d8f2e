#!/usr/bin/env bash
# cargo-nextest, the test runner, unless there is one already.
source "$(dirname "$0")/lib.sh"

command -v cargo-nextest >/dev/null && exit
install_crate cargo-nextest "$CARGO_NEXTEST_VERSION" cargo-nextest
