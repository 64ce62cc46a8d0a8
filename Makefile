PYTHON ?= python3
# Another build of torch: make install CONSTRAINTS= TORCH="torch==2.12.* --index-url ..."
CONSTRAINTS ?= -c constraints.txt
TORCH ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: install install-test demo test test-slow lint

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minidit needs Python 3.10 or later; make PYTHON=python3.12 chooses one")'
	$(PYTHON) -m venv .venv
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) $(CONSTRAINTS) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) $(CONSTRAINTS) -e '.[test,report]'
	touch $@

install: .venv/installed
install-test: .venv/installed-test

demo: .venv/installed
	.venv/bin/python -m minidit generate "a red circle moves left to right" --output demo.mp4

test: .venv/installed-test
	.venv/bin/python -m pytest -m "not gpu and not slow" -q

test-slow: .venv/installed-test
	.venv/bin/python -m pytest -m "not gpu" -q

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
