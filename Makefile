# This file has every command of the repository, for laptops and for CI. `make help` lists the commands. Most commands run
# a script in scripts/.

PYTHON ?=            # the Python to use, 3.11 or newer; if empty, make uses the newest that it finds
VENV ?= .venv
override VENV := $(patsubst %/,%,$(VENV))
ifneq ($(word 2,$(VENV)),)
$(error VENV=$(VENV): make cannot make a folder whose path has a space)
endif
BIN := $(VENV)/bin
SERVERS ?=           # packages of tests/servers/requirements.in; with them, `make test-servers` tests only with their servers
# With `=`, make ignores these five names in the environment, because other programs set such names: WSL on Windows sets NAME.
UPGRADE =            # with UPGRADE=--upgrade, `make lock` locks the newest versions
NAME =               # the name of the service that `make service` makes or `make remove` removes, such as likes
FORCE =              # with FORCE=1, `make remove` also deletes files of the service that are not committed
FORMAT =             # how `make services` prints the services: table (the default), names or json
FILE =               # the file of a snapshot of Redis, for `make backup` and `make restore`

ENGINE ?=            # docker (with buildx), podman or buildah; if empty, make uses the first of these that it finds
SERVICE ?=           # the service to work on, such as hitcounter; if empty, `make run` takes the first, other commands take all
IMAGE ?=             # the name of SERVICE's image; the default is the service's name
PLATFORMS ?= linux/amd64,linux/arm64
LAYOUT ?=            # the folder for the OCI layout of SERVICE's image; the default is SERVICE.oci
WHEELS ?= wheels
override WHEELS := $(patsubst %/,%,$(WHEELS))
BUILD_OPTIONS ?=     # more options for the engine's build, such as --build-arg BASE=... for a mirror's image

KUBECTL ?= kubectl
NAMESPACE ?= hitcounter
REGISTRY ?=          # the registry that the cluster pulls from, such as registry.example.com/team; minikube and kind need none
VALKEY ?=            # an image that replaces the manifests' image of Valkey, as name:tag

REGISTRIES ?=        # where to publish, such as "ghcr.io/me docker.io/me"; the manifests use the first
SIGNING_KEY ?=       # the file of a private key of OpenSSH that signs the bundle of `make bundle`
MIRROR ?=            # for `make bundle`, a registry that has the images of other projects, under the same paths
DIST ?= dist
ORAS ?=              # the path of an oras to use; if empty, Go builds oras
HELM ?=              # the path of a helm to use; if empty, Go builds helm
TAG ?=               # the tag of the release, such as v0.1.0
DIGESTS ?=           # the expected digest of each image, as `make release-digest` prints them: {"hitcounter":"sha256:..."}
SUMS ?=              # the expected digest of SHA256SUMS, the file with the checksums of a release's files

PROMETHEUS ?=        # the folder of the machine's own prometheus and promtool, for `make test-monitoring`
CRDS ?=              # the folder or URL of the Prometheus operator's definitions, for `make e2e`; default: those on GitHub
DEBIAN_MIRROR ?= http://deb.debian.org/debian
QEMU ?=              # the path of the machine's own qemu-aarch64, for `make test-arm64`
TESTS ?=             # the files and folders of tests that `make test` and `make test-python-next` run; default: all

# The scripts and the tests read these variables from the environment.
export PYTHON VENV ENGINE SERVICE IMAGE PLATFORMS LAYOUT WHEELS BUILD_OPTIONS KUBECTL NAMESPACE REGISTRY VALKEY FILE
export REGISTRIES SIGNING_KEY MIRROR BUILDKIT DIST ORAS HELM TAG DIGESTS SUMS UPGRADE SERVERS DEBIAN_MIRROR

.DEFAULT_GOAL := help
.NOTPARALLEL:

# --- Every day ---

.PHONY: help run services service remove rename-project
.PHONY: test test-services test-newest test-python-next test-servers test-busybox run-check coverage lint format types
.PHONY: clean

# `make run` needs the service's packages, and a Valkey.
$(VENV)/can-run: requirements.txt requirements-dev.txt
	@sh scripts/install.sh $@

# Most other targets need the development packages as well as the service's packages.
$(VENV)/installed: $(VENV)/can-run
	@sh scripts/install.sh $@

help: ## list the targets
	@awk -F ':.*## ' \
	    '/^# --- / { gsub(/^# --- | ---$$/, ""); group = "\n" $$0 "\n" } \
	    /^[a-z0-9-]+:.*## / { printf "%s  make %-21s  %s\n", group, $$1, $$2; group = "" }' $(MAKEFILE_LIST)

run: $(VENV)/can-run ## run the first service, or SERVICE, with a Valkey of its own in .data/ unless REDIS_HOST is set
	@exec sh scripts/run.sh

LIMIT ?= 180         # the seconds within which the service of `make run-check` must answer
run-check: ## start the first service with `make run`, send it two requests, and stop it
	@sh scripts/run-check.sh $(LIMIT)

services: ## list the services and their ports; FORMAT=json prints the names as JSON, for workflows
	@sh scripts/services.sh $(FORMAT)

service: $(VENV)/installed ## make the service NAME, or add what an existing service lacks; needs git and kubectl
	@$(BIN)/python scripts/service.py add "$(NAME)"

remove: $(VENV)/installed ## remove the service NAME: its files, and its entry in each list; needs git and kubectl
	@$(BIN)/python scripts/service.py remove "$(NAME)"

rename-project: $(VENV)/installed ## rename namespace, labels, Compose project and images' folder to NAME; needs git and kubectl
	@$(BIN)/python scripts/service.py rename-project "$(NAME)"

# Run the tests in four processes: while a test of one process waits, tests of the other processes run.
test: $(VENV)/installed ## run all tests that need only this machine, or those in TESTS
	@$(BIN)/python -m pytest -n 4 --dist worksteal $(TESTS)

test-services: $(VENV)/installed ## make, remove and test services in copies of the repository
	@$(BIN)/python -m pytest -n 3 -m generator tests/delivery/test_services.py

test-newest: ## run the contract tests with the newest aiohttp and redis-py; these tests may fail
	@$(MAKE) --no-print-directory VENV=.venv-newest .venv-newest/installed
	@VENV=.venv-newest sh scripts/test-newest.sh

# Programs of Debian, with the packages that they need. They are unpacked, so the machine's own packages do not change.
DEBIAN := .tools/debian
# Forky is the release of Debian after Debian 13. Until Debian publishes it, its Python 3.14 gets newer patches.
$(DEBIAN)/python-next/done: scripts/debian.sh
	@sh scripts/debian.sh $@ forky python3.14-venv

test-python-next: $(DEBIAN)/python-next/done ## run all tests, or those in TESTS, with Python 3.14 from Debian
	@$(MAKE) --no-print-directory VENV=.venv-next PYTHON=$(abspath $(DEBIAN)/python-next/bin/python3.14) test

test-servers: $(VENV)/installed ## run the tests of the services with Redis 6.2, Redis 8 and Valkey 8 (or SERVERS=)
	@sh scripts/test-servers.sh

$(DEBIAN)/busybox/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie busybox dash original-awk

test-busybox: $(VENV)/installed $(DEBIAN)/busybox/done ## run the tests of the scripts without GNU's tools, as on macOS
	@sh scripts/test-busybox.sh $(DEBIAN)/busybox/bin

coverage: $(VENV)/installed ## run the tests, and show which lines they do not reach
	@$(BIN)/coverage run -m pytest -n 4 --dist worksteal && $(BIN)/coverage combine --quiet && $(BIN)/coverage report

# The lock has no shellcheck for Linux on aarch64; there `make lint` needs a shellcheck on PATH.
SHELLCHECK = $(or $(wildcard $(BIN)/shellcheck),shellcheck)
HAS_SHELLCHECK = command -v $(SHELLCHECK) >/dev/null \
|| { echo "make: shellcheck is needed, and the lock has none for this platform; on Debian: apt install shellcheck" >&2; exit 1; }

# shellcheck needs the option --shell, because redis.sh, .ci/steps and the files in scripts/lib/ do not name their shell.
lint: $(VENV)/installed ## check the style of code, scripts, YAML and workflows
	@$(HAS_SHELLCHECK)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/yamllint --strict .
	@$(SHELLCHECK) --shell=sh --external-sources --source-path=SCRIPTDIR \
	    scripts/*.sh scripts/*/*.sh manifests/*/*.sh compose/*.sh
	@$(SHELLCHECK) --shell=bash .ci/run .ci/steps .ci/buildah .ci/devcontainer/check
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.compose-spec compose.yaml
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.renovate .github/renovate.json
	@$(BIN)/zizmor --quiet --no-progress --offline --pedantic --strict-collection .github
	@sh scripts/lint-openapi.sh
	@if [ "$$CI" ] || command -v go >/dev/null; then \
	    actionlint=$$(go -C scripts/tools/actionlint tool -n actionlint) \
	    && "$$actionlint" -shellcheck=$(SHELLCHECK) -pyflakes=; \
	else \
	    echo "make: without Go, workflows are not checked by actionlint"; \
	fi

format: $(VENV)/installed ## fix the style of the Python files
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(VENV)/installed ## check types
	@$(BIN)/mypy

clean: ## remove all files that these commands made, except the counts in .data/ and the images in an engine
	rm -rf $(patsubst %/made-by-make,%,$(sort $(wildcard $(VENV)/made-by-make .venv-*/made-by-make))) \
	    wheels wheels.new *.oci dist .tools .servers
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Dependencies ---

.PHONY: lock lock-check update renovate-check

lock: $(VENV)/installed ## write each requirements*.txt from its requirements*.in; UPGRADE=--upgrade takes the newest versions
	@sh scripts/lock.sh

lock-check: $(VENV)/installed ## fail if a lock does not follow from its requirements*.in, or lacks wheels for a platform
	@sh scripts/lock-check.sh
	@sh scripts/lock-platforms.sh

update: $(VENV)/installed ## take newer versions (of packages, only those published a week ago or earlier) and show what changed
	@sh scripts/update-packages.sh
	@sh scripts/update-images.sh
	@sh scripts/update-actions.sh
	@sh scripts/update-changes.sh

renovate-check: ## fail if a rule of .github/renovate.json matches nothing; print what is done with each dependency
	@sh scripts/renovate-check.sh

# --- Monitoring ---

.PHONY: dashboard test-monitoring

$(DEBIAN)/monitoring/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie prometheus prometheus-alertmanager

.venv-monitoring/dashboard: monitoring/requirements.txt
	@sh scripts/install.sh $@

dashboard: .venv-monitoring/dashboard ## write the dashboard's JSON file from monitoring/dashboard.py
	@.venv-monitoring/bin/python monitoring/dashboard.py manifests/components/monitoring/dashboard.json

# Without PROMETHEUS, the tests use Prometheus of Debian 13, which is unpacked below .tools/.
NEEDS_PROMETHEUS = $(VENV)/installed $(if $(PROMETHEUS),,$(DEBIAN)/monitoring/done) .venv-monitoring/dashboard
WITH_PROMETHEUS = PROMETHEUS="$(or $(PROMETHEUS),$(abspath $(DEBIAN)/monitoring/bin))" \
    MONITORING_PYTHON="$(abspath .venv-monitoring/bin/python)"
test-monitoring: $(NEEDS_PROMETHEUS) ## let a real Prometheus scrape services, and test rules and dashboard with it
	@$(WITH_PROMETHEUS) $(PYTEST_SLOW) -m monitoring tests

# hitcounter: begin
.PHONY: dashboard-picture

dashboard-picture: $(NEEDS_PROMETHEUS) ## run hitcounter with faults for a minute, and draw its dashboard: docs/dashboard.svg
	@$(WITH_PROMETHEUS) PICTURE=docs/dashboard.svg $(PYTEST_SLOW) -m monitoring tests/monitoring/test_dashboard.py

# --- Harder tests of hitcounter ---

.PHONY: test-clock test-proxies attack chaos

PROXIES ?=           # the folder of the machine's own nginx and haproxy, such as /usr/sbin, for `make test-proxies`
RESTARTS ?= 20       # how many instances `make test-proxies` restarts behind each proxy
ATTACK_SECONDS ?= 10
ATTACKS ?=           # the attacks of `make attack`, as an expression for pytest's option -k; default: all
export RESTARTS ATTACK_SECONDS

$(DEBIAN)/proxies/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie nginx-light haproxy

test-clock: $(VENV)/installed ## send 500,000 Idempotency-Keys while Redis's clock jumps; `make test` sends 25,000
	@CLOCK_KEYS=500000 $(BIN)/python -m pytest -n 2 -rP tests/hitcounter/test_clock.py

# Without PROXIES, the tests use nginx and HAProxy of Debian 13, which are unpacked below .tools/.
test-proxies: $(VENV)/installed $(if $(PROXIES),,$(DEBIAN)/proxies/done) ## test the service behind nginx and HAProxy
	@PROXIES="$(or $(PROXIES),$(abspath $(DEBIAN)/proxies/bin))" $(PYTEST_SLOW) -m proxies tests

attack: $(VENV)/installed ## attack the service in many ways, each for ATTACK_SECONDS; print latencies and memory
	@$(PYTEST_SLOW) -m attack $(if $(ATTACKS),-k '$(ATTACKS)') tests

chaos: $(VENV)/installed ## break the primary of a replicated store 35 times in 15 minutes; no number may be lost
	@$(BIN)/python -m tests.hitcounter.chaos

# --- Benchmark ---

.PHONY: bench bench-quick

BENCH := .venv-bench
BEFORE ?=            # another checkout of this repository, to compare its hitcounter with this one's

# The image has the Python of Debian 13, which was built with optimisation. A Python without optimisation is half as fast.
$(DEBIAN)/bench/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie python3.13-venv wrk nginx-light libnginx-mod-http-lua webdis

$(BENCH)/peers: requirements.txt requirements-dev.txt bench/requirements.txt $(if $(PYTHON),,$(DEBIAN)/bench/done)
	@PYTHON="$(or $(PYTHON),$(abspath $(DEBIAN)/bench/bin/python3.13))" sh scripts/install.sh $@

RUN_BENCH = DEBIAN_ROOT="$(if $(PYTHON),,$(abspath $(DEBIAN)/bench))" BEFORE="$(BEFORE)" $(BENCH)/bin/python -m bench.run

bench: $(BENCH)/peers ## compare the service with its peers in 15 minutes; write bench/results.md and bench/results.svg
	@$(RUN_BENCH)

bench-quick: $(BENCH)/peers ## show that the benchmark runs; write nothing
	@$(RUN_BENCH) --quick
# hitcounter: end

# --- Image ---

.PHONY: wheels image image-check image-multiarch image-digest builder test-image test-arm64
.PHONY: test-bundle test-publish

wheels: $(VENV)/can-run ## download the packages for images, and check their hashes; builds then need no network
	@sh scripts/wheels.sh

image: ## build the image of each service, or of SERVICE, and load it into the engine (ENGINE=)
	@sh scripts/each.sh image.sh

image-check: ## build twice with each installed engine, from different copies of the sources; compare the digests
	@sh scripts/each.sh image-check.sh

image-multiarch: ## write an OCI layout for amd64 and arm64 to SERVICE.oci/
	@sh scripts/each.sh image-multiarch.sh

image-digest: ## build for amd64 and arm64, and print the digests
	@sh scripts/each.sh image-digest.sh

# The digest of an image depends on its builder, so releases use a fixed BuildKit. The digest of this BuildKit image was found in
# three independent public sources before it was pinned.
BUILDKIT ?= docker.io/moby/buildkit:v0.31.2@sha256:2f5adac4ecd194d9f8c10b7b5d7bceb5186853db1b26e5abd3a657af0b7e26ec
# The builder uses the host's network, because one test builds with a package index on the host's loopback.
builder: ## create and select the builder that releases use, a BuildKit of a fixed version
	@docker buildx rm --force hitcounter >/dev/null 2>&1 || true
	@docker buildx create --name hitcounter --use --bootstrap \
	    --driver docker-container --driver-opt image=$(BUILDKIT),network=host

HAS_WHEELS = [ -d "$(WHEELS)" ] || { echo "make: the tests build without a network; first run: make wheels" >&2; exit 1; }
PYTEST_SLOW = $(BIN)/python -m pytest -o faulthandler_timeout=900 -rfEP

test-image: $(VENV)/installed ## run the tests of the image, on the first engine that is found
	@sh scripts/engines.sh >/dev/null
	@$(HAS_WHEELS)
	@$(PYTEST_SLOW) -m image tests/delivery

$(DEBIAN)/qemu/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie qemu-user

# Without QEMU, the tests use QEMU of Debian 13, which is unpacked below .tools/.
test-arm64: $(VENV)/installed $(if $(QEMU),,$(DEBIAN)/qemu/done) ## run the image for arm64 on another architecture, and test it
	@sh scripts/engines.sh >/dev/null
	@$(HAS_WHEELS)
	@QEMU=$(or $(QEMU),$(abspath $(DEBIAN)/qemu/bin/qemu-aarch64)) $(PYTEST_SLOW) -m arm64 tests/arm64

# hitcounter: begin
.PHONY: test-compose
test-compose: $(VENV)/installed ## run the tests of compose.yaml, with Docker Compose
	@docker compose version >/dev/null || { echo "make: Docker with its plugin Compose is needed" >&2; exit 1; }
	@$(HAS_WHEELS)
	@$(PYTEST_SLOW) -m compose tests/delivery
# hitcounter: end

$(DEBIAN)/bundle/done: scripts/debian.sh
	@sh scripts/debian.sh $@ trixie docker-registry apache2-utils docker.io docker-cli containerd busybox dash

test-bundle: $(VENV)/installed $(DEBIAN)/bundle/done ## run the tests of the bundle, with the registry REGISTRY; some need root
	@sh scripts/engines.sh >/dev/null
	@$(HAS_WHEELS)
	@BUNDLE_TOOLS=$(abspath $(DEBIAN)/bundle/bin) $(PYTEST_SLOW) -n 2 --dist loadfile -m bundle tests/delivery

test-publish: $(VENV)/installed ## run the tests that publish into the registry REGISTRY, on the first engine that is found
	@[ "$$REGISTRY" ] \
	|| { echo "make: which registry may the tests write to? make test-publish REGISTRY=localhost:5000" >&2; exit 1; }
	@$(HAS_WHEELS)
	@$(PYTEST_SLOW) -m registry tests/delivery

# --- Kubernetes ---

.PHONY: deploy undeploy secret secret-rotate backup restore manifests manifests-check chart test-chart tools render-check

deploy: ## build and deploy all services, or SERVICE, on the current cluster; print the URLs
	@sh scripts/deploy-check.sh
	@sh scripts/each.sh image.sh
	@sh scripts/deploy.sh

undeploy: ## delete everything that `make deploy` made, including the counts
	@sh scripts/undeploy.sh

secret: ## make the missing passwords in the cluster
	@sh scripts/secret.sh

secret-rotate: ## replace all passwords, or the password of SERVICE, without a failed request
	@sh scripts/secret-rotate.sh

backup: ## write a snapshot of Redis's current data to FILE
	@sh scripts/backup.sh

restore: ## restart Redis with the snapshot FILE; Redis's volume keeps the old data until the next restore
	@sh scripts/restore.sh

manifests: ## write manifests/rendered/ again: one plain file for each variant
	@sh scripts/manifests.sh manifests/rendered

chart: $(VENV)/installed ## write those parts of chart/ again that follow from other files
	@$(BIN)/python scripts/chart.py chart

test-chart: $(VENV)/installed ## run the tests of the chart, with Helm
	@$(BIN)/python -m pytest -n 2 -m chart tests/delivery

manifests-check: ## compare manifests/rendered/ with the output of an old and of a new Kustomize, which Go builds
	@sh scripts/manifests-check.sh

TOOLS ?= .tools
WITH_TOOLS = PATH="$(abspath $(TOOLS)):$$PATH"
tools: ## with Docker, write the Skaffold that devcontainer/Containerfile pins to .tools/ (or to TOOLS=)
	@docker buildx build --quiet --file=devcontainer/Containerfile --target=skaffold --output="$(TOOLS)" devcontainer

render-check: $(VENV)/installed ## compare the output of `skaffold render` with manifests/rendered/
	@$(WITH_TOOLS) $(BIN)/python -m pytest -m skaffold tests/delivery/test_skaffold.py

# hitcounter: begin
.PHONY: e2e e2e-nodes e2e-nodes-slow

e2e: $(VENV)/installed ## run the tests of tests/e2e on the current cluster, in their own namespaces and in `monitoring`
	@NAMESPACE=hitcounter-e2e sh scripts/deploy-check.sh
	@$(WITH_TOOLS) $(PYTEST_SLOW) -m cluster tests/e2e

NODES ?=             # a command that loses a node of the cluster: see tests/support/nodes.py
export NODES
e2e-nodes: $(VENV)/installed ## test drains, the autoscaler and lost nodes, on three nodes with metrics (NODES=)
	@NAMESPACE=hitcounter-e2e sh scripts/deploy-check.sh
	@$(PYTEST_SLOW) -m "nodes and not slow" tests/e2e

e2e-nodes-slow: $(VENV)/installed ## run the slower tests on the same cluster, in about 10 minutes (NODES=)
	@NAMESPACE=hitcounter-e2e sh scripts/deploy-check.sh
	@$(PYTEST_SLOW) -m "nodes and slow" tests/e2e
# hitcounter: end

# --- Releases ---

.PHONY: release-check release-digest release-compare sbom release-files bundle bundle-bases release-sums release-files-compare
.PHONY: publish sign

release-check: ## fail unless the changelog has a section for the version, and TAG, if given, is the version's tag
	@sh scripts/release-check.sh

release-digest: ## print the digest of each image in SERVICE.oci/, as digests={"SERVICE":"sha256:..."}
	@sh scripts/release-digest.sh

release-compare: ## fail unless each image in SERVICE.oci/ has its digest in DIGESTS
	@sh scripts/each.sh release-compare.sh

sbom: $(VENV)/can-run ## write dist/SERVICE.spdx.json, the list of contents of SERVICE.oci/; each run writes the same bytes
	@sh scripts/each.sh sbom.sh

release-files: sbom ## write the release's files to dist/release/: manifests, chart, lists of contents, checksums
	@sh scripts/release-files.sh

bundle: $(VENV)/can-run ## build all images, and write dist/NAME-VERSION-airgap.tar for clusters without internet
	@[ ! "$$SIGNING_KEY" ] || ssh-keygen -l -f "$$SIGNING_KEY" >/dev/null
	@[ -d "$(WHEELS)" ] || $(MAKE) --no-print-directory wheels
	@$(MAKE) --no-print-directory image-multiarch sbom
	@sh scripts/bundle.sh

bundle-bases: $(VENV)/can-run ## write dist/NAME-VERSION-airgap-bases.tar, the images that a rebuild of the bundle's images needs
	@BASES=1 sh scripts/bundle.sh

release-sums: ## print the digest of dist/release/SHA256SUMS, as sums=...
	@sh scripts/release-sums.sh

release-files-compare: ## fail if the digest of dist/release/SHA256SUMS is not SUMS, or if a file has another checksum
	@sh scripts/release-files-compare.sh

publish: ## publish the images of SERVICE.oci/, their lists of contents and the chart in REGISTRIES
	@sh scripts/each.sh publish.sh
	@sh scripts/chart-publish.sh

sign: ## sign the images of SERVICE.oci/ and the chart in REGISTRIES with cosign, as you or the workflow
	@sh scripts/each.sh sign.sh
	@sh scripts/chart-sign.sh
