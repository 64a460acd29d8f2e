#!/usr/bin/env bash
# Builds the image, with buildah, docker or podman, whichever is there (BUILDER= chooses).
#
#   scripts/build-image.sh [--tag NAME:TAG]... [--platform linux/arm64] [--local-bases] [-- OPTIONS OF THE BUILDER]
#
# --tag            [default: pgsidecar:VERSION]
# --platform       for another processor, or several (docker buildx): by emulation, which takes an hour. Better on such a machine.
# --local-bases    no registry of images is asked: the base images are those that scripts/image-bases.sh has made of Debian's packages and the
#                  Rust that is here, and it's called for those that are missing. For buildah (or podman) as root.
# What stands behind -- goes to the builder as it is, e.g. --push, or --volume for a cargo registry (or its configuration) of your own at
# /usr/local/cargo in the build.
source "$(dirname "$0")/image-lib.sh"
cd "$ROOT"

tags=() platform=() bases=() local_bases=
while [[ $# -gt 0 ]]; do
    case $1 in
    --tag) tags+=("${2:?--tag takes a name}") && shift 2 ;;
    --platform) platform=(--platform "${2:?--platform takes a platform}") && shift 2 ;;
    --local-bases) local_bases=1 && shift ;;
    --) shift && break ;;
    *) die "wrong usage: $1 (see the top of $0)" ;;
    esac
done
[[ ${#tags[@]} -gt 0 ]] || tags=("pgsidecar:$(version)")

if [[ -n $local_bases ]]; then
    export BUILDER=buildah
    "$ROOT/scripts/image-bases.sh"
    # No isolation but chroot works in a container, and it needs no runtime; nothing is looked for elsewhere.
    bases=(--isolation chroot --pull-never)
    for base in debian rust postgres; do
        bases+=(--build-arg "${base^^}=localhost/pgsidecar-base-$base")
    done
fi
builder=$(find_builder)

# What is built is the working tree: one that differs from its commit says so.
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[[ $revision == unknown || -z $(git status --porcelain --untracked-files=no) ]] || revision+=-modified
# The commit's time rather than now: the same sources give the same labels.
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
# Without the credentials that the URL may hold: whoever has the image can read its labels.
source=${PGSIDECAR_SOURCE_URL:-$(git remote get-url origin 2>/dev/null | grep '^https://' || true)}
source=$(sed -E 's|^([a-z+]+://)[^/]*@|\1|' <<<"$source")

case $builder in
docker) build=(docker buildx build) && docker buildx version >/dev/null 2>&1 || build=(docker build) ;;
buildah) build=(buildah bud --layers) ;;
podman) build=(podman build --layers) ;;
esac
began=$SECONDS
"${build[@]}" "${platform[@]}" "${bases[@]}" \
    --build-arg "VERSION=$(version)" --build-arg "REVISION=$revision" --build-arg "SOURCE=$source" \
    --build-arg "CREATED=$(date --utc --date="@$epoch" +%FT%TZ)" \
    "${tags[@]/#/--tag=}" --file Dockerfile "$@" .
log "built ${tags[*]} with $builder in $((SECONDS - began)) s"
