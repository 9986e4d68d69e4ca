# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests. Both make .venv first, once.
#   make docs                               the documentation as a site: build/site/index.html
#   make demo PYTHON=python3.12            another interpreter (≥ 3.11)
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"    the CPU build of torch on Linux
PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin

.PHONY: demo test check docs install clean

demo: install
	$(BIN)/pipeline demo

test: check
	$(BIN)/pytest -n 2

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: install
	$(BIN)/mkdocs build --strict

install: $(VENV)/.installed

# Dependencies only follow the two files that name them; the code itself is an editable install.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tcsae needs Python 3.11 or newer; this is " + sys.version.split()[0] + ": make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[all,dev,docs]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
