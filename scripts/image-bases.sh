#!/usr/bin/env bash
# Stand-ins for the base images, where no registry of images can be reached: made of Debian's packages and of the Rust that is here.
#
#   localhost/pgsidecar-base-debian      for debian:trixie-slim: a minimal Debian 13 without documentation, as that is
#   localhost/pgsidecar-base-rust        for rust:slim-bookworm: Debian 12 with gcc, and the toolchain of rust-toolchain.toml from rustup here
#   localhost/pgsidecar-base-postgres    for postgres:18-trixie: Debian 13 with what is needed of PostgreSQL's client packages, from Debian
#                                        unstable, since Debian 13 has an older one
#
# Only those that are missing are made. As root, with buildah and debootstrap; STORAGE_DRIVER=vfs where there is no overlay.
source "$(dirname "$0")/image-lib.sh"

readonly BASE=localhost/pgsidecar-base
missing() { ! buildah inspect --type image "$BASE-$1" >/dev/null 2>&1; }
missing debian || missing rust || missing postgres || exit 0
need_root_or_explain "the base images" "$ROOT/scripts/image-bases.sh"
apt_install buildah debootstrap

WORK=$(mktemp -d "${TMPDIR:-/tmp}/pgsidecar-bases.XXXXXX")
trap 'remove_debian_root "$WORK/root"; rm -rf --one-file-system "$WORK"' EXIT
export BUILDAH_ISOLATION=chroot

# commit NAME CONTAINER
commit() {
    buildah commit --quiet "$2" "$BASE-$1" >/dev/null
    buildah rm "$2" >/dev/null
    log "made $BASE-$1"
}

# slim SUITE: a container of a minimal Debian, as the official images are: without what their configuration of dpkg leaves out, and no lists.
slim() {
    debian_root "$1" "$WORK/root" apt
    printf 'path-exclude /usr/share/%s/*\n' doc info locale man >"$WORK/root/etc/dpkg/dpkg.cfg.d/docker"
    echo 'path-include /usr/share/doc/*/copyright' >>"$WORK/root/etc/dpkg/dpkg.cfg.d/docker"
    find "$WORK/root/usr/share/doc" -type f ! -name copyright -delete
    find "$WORK"/root/usr/share/{info,locale,man} -type f -delete
    rm -rf "$WORK"/root/var/lib/apt/lists/* "$WORK"/root/var/cache/apt/* "$WORK"/root/var/log/{apt,dpkg.log,bootstrap.log}
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$WORK/root" / >/dev/null
    buildah config --cmd bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    remove_debian_root "$WORK/root"
}

if missing debian; then
    slim trixie
    commit debian "$container"
fi

if missing rust; then
    # In the project's folder, for its pinned toolchain.
    toolchain=$(cd "$ROOT" && rustc --print sysroot)
    slim bookworm
    buildah run "$container" -- sh -euc 'export DEBIAN_FRONTEND=noninteractive; apt-get update -qq; apt-get install -qq -y --no-install-recommends gcc libc6-dev ca-certificates >/dev/null'
    for part in bin lib; do buildah add --quiet "$container" "$toolchain/$part" "/usr/local/$part" >/dev/null; done
    buildah config --env CARGO_HOME=/usr/local/cargo "$container"
    commit rust "$container"
fi

if missing postgres; then
    container=$(buildah from --pull-never "$BASE-debian")
    # Unpacked rather than installed: unstable's packages want unstable's libraries. They run with those of Debian 13, or the build fails.
    # shellcheck disable=SC2016 # the container's shell expands it
    buildah run "$container" -- sh -euc '
        sed "s/trixie/sid/" /etc/apt/sources.list >/etc/apt/sources.list.d/sid.list
        # A mirror may lag behind; debootstrap does not look at that either.
        apt-get update -qq -o Acquire::Check-Valid-Until=false
        cd /tmp
        newest=$(apt-cache pkgnames postgresql-client- | grep -x "postgresql-client-[0-9]*" | sort -V | tail -n 1)
        apt-get download -qq "$newest/sid" libpq5/sid
        for package in ./*.deb; do dpkg-deb -x "$package" /; done
        rm -rf ./*.deb /var/lib/apt/lists/*'
    commit postgres "$container"
fi
