#!/usr/bin/env bash
# PostgreSQL 15, Debian 12's own, and the small tools that the tests and the demo use. Installs what is missing; starts nothing.
source "$(dirname "$0")/lib.sh"

have() { [[ -x $(pg_bin_15)/initdb ]] && command -v zstd >/dev/null && command -v curl >/dev/null && command -v openssl >/dev/null; }

if [[ $EUID -ne 0 ]] && have; then
    exit 0
fi

# Debian's package makes and starts a server when it is installed. Nobody asked for that one. Only for the time of this installation.
no_cluster=/etc/postgresql-common/createcluster.d/pgsidecar-dev.conf
if [[ $EUID -eq 0 && ! -e $(pg_bin_15)/initdb ]]; then
    trap 'rm -f "$no_cluster"' EXIT
    mkdir -p "${no_cluster%/*}"
    echo "create_main_cluster = false" >"$no_cluster"
fi
apt_install postgresql-15 postgresql-client-15 zstd curl openssl
[[ -x $(pg_bin_15)/initdb ]] || die "there is no $(pg_bin_15)/initdb"
