#!/usr/bin/env bash
# Garage, the S3 server of `make test-garage`: ignores conditional creation (If-None-Match). Some ten to twenty minutes the first time.
source "$(dirname "$0")/lib.sh"

[[ -n ${GARAGE:-} && -x $GARAGE ]] && exit
install_crate garage "$GARAGE_VERSION" garage
