#!/usr/bin/env bash
# `make fuzz`: libFuzzer on what the webhook makes of a request's body, for a minute or FUZZ_SECONDS. What it finds is in
# webhook/fuzz/artifacts; what it has learned in webhook/fuzz/corpus, for the next time.
#
# The pinned toolchain will do: coverage needs a few flags (those that cargo-fuzz gives), and a sanitizer would find nothing, as there is
# no unsafe code. What is looked for is a panic, an overflow, an input that takes 5 s, or more memory than a pod has.
#
#   FUZZ_SECONDS=60 scripts/fuzz.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT/webhook/fuzz"

HOST=$(rustc -vV | awk '$1 == "host:" { print $2 }')
FLAGS=(
    -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks --cfg fuzzing
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
)
# With a target, so that build scripts and macros are built without these.
RUSTFLAGS="${FLAGS[*]}" cargo build --release --locked --target "$HOST"
mkdir -p corpus/review artifacts/review
exec "target/$HOST/release/review" corpus/review seeds/review -artifact_prefix=artifacts/review/ \
    -max_total_time="${FUZZ_SECONDS:-60}" -timeout=5 -rss_limit_mb=512 -max_len=65536 -dict=json.dict -print_final_stats=1
