#!/usr/bin/env bash
# Runs shellcheck on every shell script of the project.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

[[ $EUID -eq 0 ]] && apt_install shellcheck
if ! command -v shellcheck >/dev/null; then
    [[ ${CI:-} != true ]] || die "shellcheck is missing"
    echo "NOT CHECKED: the shell scripts (apt-get install shellcheck)"
    exit 0
fi
shellcheck --external-sources --source-path=SCRIPTDIR .ci/run scripts/*.sh tests/*/run
echo "shell scripts ok"
