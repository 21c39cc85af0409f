PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/installed

.PHONY: search test install

# An ASHA search end to end on the embedded digits: no download.
search: $(INSTALLED)
	$(RUN) -m tune.asha --arch classic_cnn --dataset digits --optimizer adam --num_samples 12 --max_epochs 27

test: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cifar_lab needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@
