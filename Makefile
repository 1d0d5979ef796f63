# `make train` trains the embedded default, `make test` runs all checks; each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test gpu gpu-check gpu-sanitize gpu-train gpu-benchmark gpu-cache
train: $(VENV)/installed-quickstart
	$(BIN)/python train.py experiment=quickstart overwrite=true

test: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Extra `$*` under the exact versions of constraints.txt; a torch that is in .venv already, such as a CPU build, stays.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: name another, as in make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

# What a GPU must show, part by part, none longer than 8 minutes; the first that fails ends it. Nothing is installed:
# $(PYTHON) has torch with CUDA, and for gpu-train all that train.py needs.
LIMITED := timeout --signal=INT --kill-after=10 480
gpu:
	$(MAKE) gpu-check
	$(MAKE) gpu-sanitize
	$(MAKE) gpu-benchmark
	$(MAKE) gpu-cache
	$(MAKE) gpu-train

gpu-check:
	$(LIMITED) $(PYTHON) scripts/check_maxsim.py

# Without torch's cache of memory, so that each tensor ends where its memory ends.
gpu-sanitize:
	@sanitizer=$$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); \
	if [ -z "$$sanitizer" ]; then echo "gpu-sanitize is NOT done: there is no compute-sanitizer"; exit 0; fi; \
	for tool in memcheck racecheck; do \
		echo "$$sanitizer --tool $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(subst 480,240,$(LIMITED)) "$$sanitizer" --tool $$tool --error-exitcode 1 \
			$(PYTHON) scripts/check_maxsim.py small=true || exit 1; \
	done

gpu-train:
	$(LIMITED) $(PYTHON) scripts/compare_maxsim_training.py

gpu-benchmark:
	$(LIMITED) $(PYTHON) scripts/benchmark_maxsim.py device=cuda readme=true

gpu-cache:
	$(LIMITED) $(PYTHON) scripts/benchmark_cache.py device=cuda
