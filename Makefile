# Each is enough on a fresh machine with Python >= 3.11:
#   make demo   installs the engine, writes out/demo.mp4 and out/demo.png
#   make test   installs the engine and what its tests need, runs them
#   make check  formatters, linter, type checker, layers and names
#   make api    the API reference, from the docstrings, in out/api
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test check api clean

demo: $(VENV)/.demo
	$(BIN)/dsa-engine generate "a red circle moves sideways on black" \
		--at 2s "a blue square moves up and down on gray" \
		--at 4s "a yellow cross moves sideways on navy" \
		--seconds 6 --seed 0 --scale 4 -o out/demo.mp4 --report out/demo.png --json

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not gpu" --numprocesses $(JOBS) --dist loadfile --durations 10

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_tree.py

api: $(VENV)/.test
	$(BIN)/pdoc --docformat google --output-directory out/api dsa_engine dsa_engine.ops dsa_engine.sampling.policy dsa_engine.serving

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/pyvenv.cfg pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(VENV)/pyvenv.cfg pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test,dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info out
