#!/usr/bin/env bash
# The AWS command-line tool, for the test that gets a backup out of S3 without pgsidecar.
source "$(dirname "$0")/lib.sh"

[[ -x /usr/bin/aws ]] && exit
if [[ $EUID -ne 0 ]] && command -v aws >/dev/null; then
    exit
fi
apt_install awscli
