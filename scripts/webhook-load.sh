#!/usr/bin/env bash
# `make webhook-load`: the webhook's program at 500 requests a second over TLS, with latencies and memory.
#
#   LOAD_RATE=500 LOAD_SECONDS=30 LOAD_P99_MS=5 LOAD_RESIDENT_MIB=15 scripts/webhook-load.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

cargo bench --locked --package pgsidecar-webhook --bench load
