#!/usr/bin/env bash
# `make fuzz`: libFuzzer on what the webhook makes of a request's body, for a minute or FUZZ_SECONDS. What it finds is in
# webhook/fuzz/artifacts; what it has learned in webhook/fuzz/corpus, for the next time.
#
# Without a sanitizer: there is no unsafe code, and the pinned toolchain will do. A panic is what is looked for, and an
# input that takes more than 5 s, or more memory than a pod has.
#
#   FUZZ_SECONDS=60 scripts/fuzz.sh
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

install_crate cargo-fuzz "$CARGO_FUZZ_VERSION" cargo-fuzz
PATH=$(cargo_fuzz_dir):$PATH
cd webhook/fuzz
mkdir -p corpus/review
RUSTC_BOOTSTRAP=1 cargo fuzz run --sanitizer none --fuzz-dir . review corpus/review seeds/review -- \
    -max_total_time="${FUZZ_SECONDS:-60}" -timeout=5 -rss_limit_mb=512 -max_len=65536 -dict=json.dict -print_final_stats=1
