# shellcheck shell=bash
# What the scripts for the image share: sourced, never run.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# buildah, docker or podman: the first that is there and answers, or BUILDER.
find_builder() {
    local builder
    for builder in ${BUILDER:-buildah docker podman}; do
        command -v "$builder" >/dev/null || continue
        # docker may be a client without an engine.
        if [[ $builder != docker ]] || docker version --format '{{.Server.Version}}' >/dev/null 2>&1; then
            echo "$builder"
            return
        fi
    done
    die "none of buildah, docker and podman is here${BUILDER:+ (BUILDER=$BUILDER)}: apt-get install buildah"
}

version() { sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml"; }
