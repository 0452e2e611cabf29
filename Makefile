# Two commands for a fresh machine: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: schema reference demo test slow torchtext soak plugins check format clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "transfer needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/transfer schema --output configs/schema.json
	touch $@

demo: .venv/ready  ## train on data that comes with the package, then predict
	$(BIN)/transfer run configs/quickstart_text.yaml
	@run=$$(ls -td runs/quickstart_text-* | head -n 1); \
	$(BIN)/transfer predict $$run "a warm, funny film that I would gladly watch again" "two hours of my life that I will never get back"; \
	echo; echo "The run is in $$run. What to try next:"; \
	echo "  $(BIN)/transfer evaluate $$run"; \
	echo "  $(BIN)/transfer run configs/quickstart_text.yaml backbone.variant=static train.batch_size=16"; \
	echo "  $(BIN)/transfer run configs/quickstart_vision.yaml"; \
	echo "  $(BIN)/transfer check configs/hymenoptera_finetune.yaml"

test: .venv/ready  ## the tests that take seconds; those on real data run when TRANSFER_DATA is set
	$(BIN)/python -m pytest -n 2

slow: .venv/ready  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

# torchtext's last release loads on torch 2.3 alone, so it has an environment of its own.
.venv-torchtext/ready: pyproject.toml constraints-torchtext.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "torchtext needs Python 3.11 or 3.12; try: make torchtext PYTHON=python3.11")'
	$(PYTHON) -m venv .venv-torchtext
	.venv-torchtext/bin/python -m pip install --quiet --constraint constraints-torchtext.txt --editable '.[torchtext]' hatchling hypothesis pytest pytest-xdist
	touch $@

torchtext: .venv-torchtext/ready  ## ours against torchtext's parts, and texts, engine and freezing on torch 2.3
	.venv-torchtext/bin/transfer show tokenizer torchtext
	.venv-torchtext/bin/python -m pytest -n 2 tests/text tests/training/test_engine.py tests/training/test_freezing.py tests/registry/test_entry_points.py

soak: .venv/ready  ## kill runs two hundred times and resume them; many minutes
	$(BIN)/python tests/e2e/kill_harness.py --kills 200

# timm and transformers are nothing that transfer needs: an environment of their own, over the packages of .venv.
PLUGINS := $(patsubst %/tests,%,$(wildcard examples/plugins/*/tests))
.venv-plugins/ready: .venv/ready constraints-plugins.txt $(PLUGINS:%=%/pyproject.toml)
	$(BIN)/python -m venv --without-pip .venv-plugins
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > $$(.venv-plugins/bin/python -c "$$site")/venv.pth
	.venv-plugins/bin/python -m pip install --quiet --constraint constraints-plugins.txt --no-build-isolation $(PLUGINS:%=--editable %)
	touch $@

# Two processes of two threads each wait for each other at every barrier.
plugins: .venv-plugins/ready  ## the packages under examples/plugins, as their authors would test them
	OMP_NUM_THREADS=1 .venv-plugins/bin/python -m pytest -n 2 $(PLUGINS)

check: .venv/ready  ## style, types, the direction of imports, spelling and terms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell --dictionary=- --dictionary=.codespell-glossary.txt

schema: .venv/ready  ## what editors know of configs, with the options of every installed plugin
	$(BIN)/transfer schema --output configs/schema.json

reference: .venv/ready  ## docs/reference.md, from signatures, docstrings and the command line
	$(BIN)/python docs/reference.py

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-torchtext .venv-plugins .mypy_cache .ruff_cache .pytest_cache dist build
