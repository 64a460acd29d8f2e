#!/usr/bin/env bash
# s3s-fs, the S3 server of `make test`: honours conditional creation (If-None-Match).
source "$(dirname "$0")/lib.sh"

[[ -n ${S3S_FS:-} && -x $S3S_FS ]] && exit
install_crate s3s-fs "$S3S_FS_VERSION" s3s-fs --features binary
