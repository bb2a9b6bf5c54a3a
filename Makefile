# setup: a virtual environment with everything. demo: a minute of film. test: every check.
.PHONY: setup demo test
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

READY := .venv/.ready

setup: $(READY)

# What decides what is installed and built: a change there installs again.
$(READY): pyproject.toml setup.py $(wildcard kernels/csrc/*)
	@.venv/bin/python -c '' 2>/dev/null || { \
	  for python in python3.12 python3.11 python3.13; do \
	    if "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	      echo "creating .venv with $$python"; \
	      "$$python" -m venv --clear .venv; \
	      exit 0; \
	    fi; \
	  done; \
	  echo 'longvid needs python3.11, 3.12 or 3.13 with the venv module (Debian: apt install python3-venv)' >&2; \
	  exit 1; \
	}
	.venv/bin/python -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@

demo: setup
	.venv/bin/longvid render examples/minute.yaml -o minute.mp4 --set output.scale=4 --ranks 2

# mypy cannot follow the folder mapping in place, so it reads an installed copy. A left-over build/ would add stale files to it.
# Tests of a file share what was costly to make, so a file is never split over workers.
test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf build
	.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/types .
	cd build/types && ../../.venv/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p longvid
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder
