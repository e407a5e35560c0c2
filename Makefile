# Needs Python 3.11 or later, and a network to set up once. Another interpreter: make PYTHON=/path/to/python

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup demo test lint wheel bench sprites chain bench-distill gpu wheelhouse figures

# An environment in .venv with the tested versions; again only when those change.
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 on found" >&2; \
		echo "hint: name one with make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]'
	touch $@

# Two videos and a contact sheet in demo/, from the model that ships with the package.
demo: setup
	$(BIN)/vidaccel generate --prompts examples/demo.txt -o demo --sheet demo/sheet.png

# The whole suite, a process a core, its files in the order of tests/conftest.py.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_types.py

# A wheel, built and installed apart, which runs with what it holds.
wheel: setup
	.ci/wheel

# README.md's table: methods on the shipped models, swept and scored; ARGS=only=null is all there are. An hour on two CPU
# cores, hours for all; goes on where it was stopped.
bench: setup
	$(BIN)/vidaccel benchmark --speedup --quality rounds=5 $(ARGS) -o runs/quality
	cp runs/quality/results.json studies/results/sprites.json
	$(BIN)/python -m studies.figures

# The shipped model made from nothing; hours on a CPU, goes on where it was stopped.
sprites: setup
	$(BIN)/python -m vidaccel.sprites make -o runs/sprites

# The shipped student and what forecasts its steps, trained further within MINUTES on one GPU, with the Python that has
# torch there; again in the same folder goes on. studies/chain/README.md has what comes next. ARGS=--conf toy shows that
# it runs.
chain:
	$(PYTHON) -m studies.chain minutes=$(or $(MINUTES),8) $(ARGS)

# Few-step students at equal training time: hours on a CPU, a row at a time. TEACHER, FEATURES, WORK, NAME, ARGS=--cost ...
bench-distill: setup
	$(BIN)/python -m studies.distill --teacher $(or $(TEACHER),sprites/teacher) --features $(or $(FEATURES),runs/features) --work $(or $(WORK),runs/bench-distill) -o studies/results/distill/$(or $(NAME),sprites).json $(ARGS)

# The figures in README.md and docs/ from studies/results/*.json.
figures: setup
	$(BIN)/python -m studies.figures

# Everything that is measured on a GPU, with the Python that has torch and triton there.
gpu:
	$(PYTHON) -m studies.gpu.run

# The wheels that a GPU machine without a network lacks.
wheelhouse:
	sh studies/gpu/wheelhouse.sh
