.DEFAULT_GOAL := help
.PHONY: help check fmt fmt-check lint deny layers shell dockerfile manifests image try-image test test-garage demo memory bench webhook-load fuzz tools clean

# The demo's store: see scripts/demo.sh.
STORE ?=

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

check: fmt-check layers shell dockerfile manifests deny lint ## all that needs no test run: format, layers, scripts, image, manifests, dependencies, clippy

fmt: ## format the code
	cargo fmt --all

fmt-check:
	cargo fmt --all --check

lint: ## clippy; a warning is an error
	cargo clippy --workspace --all-targets --locked -- -D warnings

deny: ## licences, bans and advisories of the dependencies
	scripts/check-deny.sh

layers: ## no runtime in the core, no dependency in pgsidecar-wal
	scripts/check-layers.sh

shell: ## shellcheck
	scripts/check-shell.sh

dockerfile: ## the Dockerfile agrees with the workspace
	scripts/check-dockerfile.sh

image: ## build the container image, with buildah, docker or podman
	scripts/build-image.sh

try-image: ## start it read-only, take a dump with it and restore that
	scripts/try-image.sh

manifests: ## Kubernetes manifests and alerts, without a cluster
	scripts/check-manifests.sh

test: ## every test, with PostgreSQL 15 and 17 and an S3 server (set up by itself)
	scripts/test.sh

test-garage: ## the store and integration tests with Garage
	scripts/test.sh garage

demo: ## a database, its backup, a disaster and its restore
	scripts/setup-postgres.sh
	cargo build --release --locked -p pgsidecar -p pgsidecar-wal
	STORE=$(STORE) scripts/demo.sh

memory: ## backup and restore of 2 GB held to 128 MiB, with the peaks
	scripts/setup-postgres.sh
	scripts/setup-s3s.sh
	cargo build --release --locked -p pgsidecar -p pgsidecar-wal
	scripts/memory.sh

bench: ## archiving, backups and restores beside pgBackRest and barman-cloud: benches/README.md
	scripts/setup-bench.sh
	scripts/setup-s3s.sh
	cargo build --release --locked -p pgsidecar -p pgsidecar-wal
	scripts/bench.sh

webhook-load: ## latency and memory of the webhook at 500 requests a second
	scripts/webhook-load.sh

fuzz: ## bytes that nobody sends, to the webhook's review: a minute, or FUZZ_SECONDS
	scripts/fuzz.sh

tools: ## only set up what check and test need
	scripts/setup-postgres.sh
	scripts/setup-postgres17.sh
	scripts/setup-s3s.sh
	scripts/setup-nextest.sh
	scripts/setup-deny.sh
	scripts/setup-manifests.sh

clean: ## remove what was built (not the tools)
	cargo clean
