# Two commands on a fresh machine: `make demo` and `make test`. Both build .venv from the pinned files first.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

.PHONY: setup demo docs test lint lock clean

setup: $(STAMP)

$(STAMP): requirements/test.txt setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Installing into $(VENV) (about 4.4 GB, a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	@$(RUN) scripts/demo.py $(ARGS)

test: setup lint docs
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Writes the documentation to site/; a broken link ends it.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "Open site/index.html. Search needs a server: $(RUN) -m mkdocs serve"

lint: setup
	@$(VENV)/bin/ruff check .

# Needs `uv`; rewrites the pinned files from requirements/*.in for Python 3.11 and 3.12 at once.
lock:
	@for name in core data raters evals video gcs compile wandb docs beam test; do (cd requirements && uv pip compile --quiet --universal --python-version 3.11 \
	  --no-annotate --custom-compile-command "make lock" $$name.in -o $$name.txt); done

clean:
	rm -rf $(VENV) build site *.egg-info runs
