# make demo | test | bench | format: each sets up .venv by itself, from a Python 3.11, 3.12 or 3.13 (PYTHON=… picks one).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test bench results format constraints clean

# Some virtual machines announce AMX and fault on its first use; bfloat16 products would end the process.
export ONEDNN_MAX_CPU_ISA ?= AVX512_CORE_BF16
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
READY := .venv/.ready

help:
	@echo "make demo    the whole story on the embedded base: offline, 2 cores, under 2 minutes after set-up"
	@echo "make test    everything that CI checks"
	@echo "make bench   weft and peft side by side; writes docs/benchmarks.md"
	@echo "make results real weights and real data; writes docs/results.md"
	@echo "make format  rewrites the code in the one style"

demo: $(READY)
	@$(BIN)/weft demo

test: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check.sh

bench: $(READY)-bench
	@MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 $(BIN)/python -m benchmarks $(ARGS)

# Real weights and real data: reads ../shared (or WEFT_SHARED), writes docs/results.md; PARTS='e2e sst2' for some of it.
results: $(READY)-bench
	@$(BIN)/python -m benchmarks.results $(PARTS)

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# After an upgrade of the packages in .venv: keep what the checks ran with.
constraints: $(READY)
	@{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh
	@touch $@

$(READY)-bench: $(READY)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@
