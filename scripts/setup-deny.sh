#!/usr/bin/env bash
# cargo-deny, for `make check`.
source "$(dirname "$0")/lib.sh"

install_crate cargo-deny "$CARGO_DENY_VERSION" cargo-deny
