#!/usr/bin/env bash
# What check-manifests.sh needs: kubectl (for its kustomize), promtool, and the schemas of Kubernetes' API. None of it talks to a cluster.
source "$(dirname "$0")/lib.sh"

apt_install python3 python3-venv

if ! has_kustomize "$(kubectl_for_manifests)"; then
    need_root_or_explain "kubectl $KUBECTL_MINOR or newer" "$ROOT/scripts/setup-manifests.sh   (or install kubectl)"
    apt_install debootstrap patchelf
    lock kubectl
    dest=$TOOLS/kubectl
    if ! has_kustomize "$dest/usr/bin/kubectl"; then
        log "fetching kubectl from Debian 13 (once; a minute; it goes to $dest)"
        debian_root trixie "$dest.tmp" kubernetes-client
        # Only the program is needed, and its libraries.
        find "$dest.tmp" -xdev -mindepth 1 -maxdepth 1 ! -name usr ! -name lib ! -name lib64 -exec rm -rf --one-file-system {} +
        find "$dest.tmp/usr" -mindepth 1 -maxdepth 1 ! -name lib ! -name lib64 ! -name bin -exec rm -rf {} +
        find "$dest.tmp/usr/bin" -mindepth 1 ! -name kubectl -exec rm -rf {} +
        find "$dest.tmp/usr/lib" -mindepth 1 -maxdepth 1 ! -name '*-linux-gnu*' ! -name 'ld-linux*' -exec rm -rf {} +
        use_own_libraries "$dest.tmp" "$dest" "$dest.tmp/usr/bin/kubectl"
        rm -rf "$dest"
        mv "$dest.tmp" "$dest"
        has_kustomize "$dest/usr/bin/kubectl" || die "kubectl was unpacked to $dest, but doesn't run here"
    fi
fi

if [[ ! -x $(promtool) ]]; then
    lock promtool
    dest=$TOOLS/promtool
    if [[ ! -x $dest/promtool ]]; then
        log "fetching promtool (once; it goes to $dest)"
        command -v apt-get >/dev/null || die "this is not Debian: set PROMTOOL to the program"
        # Out of the package: installed, it would bring the server along, and start it.
        rm -rf "$dest" "$dest.tmp"
        mkdir -p "$dest.tmp"
        [[ $EUID -ne 0 ]] || apt-get update -qq </dev/null || log "apt-get update had errors; going on with the lists that there are"
        (cd "$dest.tmp" && apt-get download -qq -o APT::Sandbox::User=root prometheus </dev/null)
        dpkg-deb --fsys-tarfile "$dest.tmp"/prometheus_*.deb | tar -x -C "$dest.tmp" --strip-components=3 ./usr/bin/promtool
        rm "$dest.tmp"/*.deb
        mv "$dest.tmp" "$dest"
    fi
fi

if [[ ! -e $(kubernetes_schemas)/complete ]]; then
    lock kubernetes-validate
    dest=$TOOLS/kubernetes-validate-$KUBERNETES_VALIDATE_VERSION
    if [[ ! -e $dest/complete ]]; then
        log "fetching the schemas of Kubernetes' API (once; they go to $dest)"
        rm -rf "$dest"
        # Made where it stays: virtual environments can't be moved.
        python3 -m venv "$dest"
        "$dest/bin/python3" -m pip install --quiet --disable-pip-version-check --no-input \
            "kubernetes-validate==$KUBERNETES_VALIDATE_VERSION" </dev/null >&2
        touch "$dest/complete"
    fi
fi
