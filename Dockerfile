# pgsidecar's image: the daemon with its command line, the helper that it hands to PostgreSQL's container, the webhook, and PostgreSQL's
# client programs for dumps.
#
#   scripts/build-image.sh --tag pgsidecar:0.1.0          or as it is: docker build -t pgsidecar .
#
# Nothing in it knows a processor: --platform builds for another one, by emulation, or on such a machine.

# Names of base images that can be had elsewhere, as behind a mirror: --build-arg RUST=...
ARG DEBIAN=docker.io/library/debian:trixie-slim
# The version of Rust is the one of rust-toolchain.toml (`make check` compares them); that file itself stays outside (.dockerignore),
# because it asks for tools that no build needs.
# On the Debian before the final stage's: drills and extracts run pgsidecar in the database's own image, which may have an older C library.
ARG RUST=docker.io/library/rust:1.95.0-slim-bookworm
# The newest PostgreSQL: pg_dump dumps servers of its own version and older ones, back to 9.2, and refuses newer ones. Only the client
# programs are taken from there, and libpq.
ARG POSTGRES=docker.io/library/postgres:18-trixie

FROM ${POSTGRES} AS client
# The programs themselves: the package's would come with its wrappers, which are Perl.
RUN set -eu; \
    mkdir -p /client/usr/local/bin; \
    for bin in /usr/lib/postgresql/*/bin; do \
        for program in pg_dump pg_dumpall pg_restore psql; do \
            cp --parents "$bin/$program" /client; \
            ln -s "$bin/$program" "/client/usr/local/bin/$program"; \
        done; \
        major=${bin%/bin}; major=${major##*/}; \
        cp --parents "/usr/share/doc/postgresql-client-$major/copyright" /usr/share/doc/libpq5/copyright /client; \
    done; \
    cp --parents --no-dereference /usr/lib/*-linux-gnu*/libpq.so.5* /client

FROM ${RUST} AS build
WORKDIR /src
# Symbols are a fifth of the file and nothing at run time; without them, a panic's backtrace has addresses alone.
ENV CARGO_PROFILE_RELEASE_STRIP=symbols
# First what it depends on, with nothing of its own: a layer that stays as long as Cargo.lock does. Each is built by itself, here and
# below: together they would get each other's features.
COPY Cargo.toml Cargo.lock ./
COPY crates/core/Cargo.toml crates/core/
COPY crates/wal-client/Cargo.toml crates/wal-client/
COPY webhook/Cargo.toml webhook/
RUN set -eu; \
    for package in . crates/core crates/wal-client webhook; do \
        mkdir "$package/src"; touch "$package/src/lib.rs"; echo 'fn main() {}' >"$package/src/main.rs"; \
    done; \
    cargo build --release --locked --package pgsidecar; \
    cargo build --release --locked --package pgsidecar-webhook; \
    # The real sources are older than what was built just now, and cargo would take that for up to date.
    cargo clean --release --package pgsidecar --package pgsidecar-core --package pgsidecar-webhook; \
    rm -r src crates/*/src webhook/src
COPY . .
# The helper runs in other people's images, with whatever C library they have: static. Its target is named, though it's the host's,
# because otherwise build scripts and macros would get the flag as well. Elsewhere the flag would break the daemon's macros.
RUN set -eu; \
    host=$(rustc -vV | sed -n 's/^host: //p'); \
    cargo build --release --locked --package pgsidecar; \
    cargo build --release --locked --package pgsidecar-webhook; \
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --package pgsidecar-wal --target "$host"; \
    mkdir /out; \
    cp target/release/pgsidecar target/release/pgsidecar-webhook "target/$host/release/pgsidecar-wal" /out/; \
    # A helper with an interpreter would start here and fail in Alpine: find it out now.
    if readelf --program-headers /out/pgsidecar-wal | grep -q INTERP; then echo 'pgsidecar-wal is not static' >&2; exit 1; fi

FROM ${DEBIAN}
# The certificates of the store and of Kubernetes' API are checked against the system's; the libraries are libpq's and psql's.
RUN set -eu; \
    apt-get update; \
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates libgssapi-krb5-2 libldap2 liblz4-1 libreadline8t64 libssl3t64 libzstd1 zlib1g; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/* /var/lib/dpkg/status-old /var/log/apt /var/log/dpkg.log /var/log/alternatives.log; \
    # It reads PostgreSQL's data directory, which is open to its owner alone: by default the user of the official image on Debian.
    # Others by the pod's runAsUser, docker's --user.
    groupadd --gid 999 pgsidecar; \
    useradd --uid 999 --gid 999 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin pgsidecar; \
    # For the control socket. With a read-only root file system a volume is mounted here.
    install -d -o 999 -g 999 -m 0700 /run/pgsidecar; \
    # A new volume of docker's has the owner of the directory that it's mounted on: these are manifests/compose's.
    install -d -o 999 -g 999 /pgsidecar /pgsidecar-spool /var/lib/pgsidecar /var/lib/postgresql/data
COPY --from=client /client/ /
COPY LICENSE /usr/share/doc/pgsidecar/LICENSE
# Beside each other: the daemon publishes the helper of its own version from there.
COPY --from=build /out/ /usr/local/bin/
# Whatever the client programs came from, they have to run here.
RUN set -eu; for program in pg_dump pg_dumpall pg_restore psql; do "$program" --version; done

ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="pgsidecar" \
      org.opencontainers.image.description="The PostgreSQL backup sidecar: WAL, base backups and restores to any point in time" \
      org.opencontainers.image.licenses="Apache-2.0 AND PostgreSQL" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED" \
      org.opencontainers.image.source="$SOURCE"

# As a number, so that the kubelet can see that it isn't root.
USER 999:999
# The sidecar's probes and metrics (what PostgreSQL uses listens on loopback only); the webhook's 8443 and 8080.
EXPOSE 7434 8443 8080
ENTRYPOINT ["pgsidecar"]
CMD ["run"]
