# pgsidecar's image: the daemon with its command line, and the helper that it hands to PostgreSQL's container.
#
#   docker build -t pgsidecar .          (buildah bud -t pgsidecar .)
#
# The version of Rust is the one of rust-toolchain.toml; that file itself stays outside (.dockerignore), because it asks for tools that
# no build needs.

FROM docker.io/library/rust:1.95.0-slim-trixie AS build
WORKDIR /src
COPY . .
# The helper runs in other people's images, with whatever C library they have: static. Its target is named, though it's the host's,
# because otherwise build scripts and macros would get the flag as well. Elsewhere the flag would break the daemon's macros.
RUN set -eu; \
    host=$(rustc -vV | sed -n 's/^host: //p'); \
    cargo build --release --locked --package pgsidecar; \
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --package pgsidecar-wal --target "$host"; \
    mkdir /out; \
    cp target/release/pgsidecar "target/$host/release/pgsidecar-wal" /out/; \
    # A helper with an interpreter would start here and fail in Alpine: find it out now.
    if readelf --program-headers /out/pgsidecar-wal | grep -q INTERP; then echo 'pgsidecar-wal is not static' >&2; exit 1; fi

FROM docker.io/library/debian:trixie-slim
# The store's certificates are checked against the system's.
RUN set -eu; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log; \
    # It reads PostgreSQL's data directory, which is open to its owner alone: by default the user of the official image on Debian.
    # Others by the pod's runAsUser, docker's --user.
    groupadd --gid 999 pgsidecar; \
    useradd --uid 999 --gid 999 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin pgsidecar; \
    # For the control socket. With a read-only root file system a volume is mounted here.
    install -d -o 999 -g 999 -m 0700 /run/pgsidecar
# Beside each other: the daemon publishes the helper of its own version from there.
COPY --from=build /out/pgsidecar /out/pgsidecar-wal /usr/local/bin/
COPY LICENSE /usr/share/doc/pgsidecar/LICENSE

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="pgsidecar" \
      org.opencontainers.image.description="The PostgreSQL backup sidecar: WAL, base backups and restores to any point in time" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# As a number, so that the kubelet can see that it isn't root.
USER 999:999
# Probes and metrics. What PostgreSQL uses listens on loopback only.
EXPOSE 7434
ENTRYPOINT ["pgsidecar"]
CMD ["run"]
