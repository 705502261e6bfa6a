# Everything runs in one environment outside the clone, keyed by pyproject.toml, this file, Python's version and LLAMAFACTORY's
# sources, and made when missing.
# the first that runs and is 3.11 or 3.12, which kt-kernel has wheels for; else 3.13
PYTHON ?= $(shell for newest in 12 13; do for p in python3 python3.12 python3.11 python3.13; do $$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $$newest))" 2>/dev/null && echo $$p && exit; done; done)
CACHE  ?= $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/llamafactory-kt
# a checkout of LLaMA-Factory to install instead of the release, for example its main branch
LLAMAFACTORY ?=
SOURCES = $(if $(LLAMAFACTORY),find $(LLAMAFACTORY)/pyproject.toml $(LLAMAFACTORY)/src -type f -name '*.py' -o -name '*.toml' | LC_ALL=C sort | xargs cat,:)
KEY    := $(shell { cat pyproject.toml Makefile; $(PYTHON) -V; $(SOURCES); } 2>&1 | sha256sum | cut -c1-12)
ENV    ?= $(CACHE)/env-$(KEY)
READY  := $(ENV)/.ready
BIN    := $(ENV)/bin
# the website's environment: it needs none of the above
SITE   := $(CACHE)/site-$(KEY)
# tests at a time: most of one is starting LLaMA-Factory, on one core and about 1 GB
JOBS   ?= 2
HERE   := $(CURDIR)
TURNS  ?= 50000
# versions to test instead: all (the rows of tests/matrix/rows.txt), or one row such as "transformers==5.24.0 peft==0.21.2"
MATRIX ?=

.PHONY: help setup demo test gpu lint types docs site architectures pictures soak format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the environment (about 8 GB, some minutes the first time) and point it at this clone
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .

$(READY):
	@echo "Making the environment $(ENV) (downloads about 4 GB the first time) ..."
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found; give one: make PYTHON=/path/to/python3.12"; exit 1; }
	@test -z "$(LLAMAFACTORY)" || test -f "$(LLAMAFACTORY)/src/llamafactory/__init__.py" || { echo "LLAMAFACTORY=$(LLAMAFACTORY) is not a checkout of LLaMA-Factory: it has no src/llamafactory"; exit 1; }
	@rm -rf "$(ENV)" && $(PYTHON) -m venv "$(ENV)" && $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --python $(BIN)/python --quiet hatchling editables ziglang # the last compiles the kernels where there is no c++
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode --no-build-isolation --editable ".[dev]" $(abspath $(LLAMAFACTORY))
	@touch $@

demo: setup ## the same prompts with and without the demo adapter, through llamafactory-cli chat
	@$(BIN)/python -m llamafactory_kt demo

ifeq ($(MATRIX),)
test: setup lint types ## everything CI checks, on the CPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)
else
test: $(CACHE)/uv/bin/uv
	$(CACHE)/uv/bin/python tests/matrix/run.py --uv $< --jobs $(JOBS) --llamafactory "$(abspath $(LLAMAFACTORY))" $(ARGS) $(MATRIX)
endif

$(CACHE)/uv/bin/uv:
	@$(PYTHON) -m venv $(CACHE)/uv && $(CACHE)/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

gpu: setup ## the tests for a GPU
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: setup ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy
	$(BIN)/mypy

docs: setup ## the pages: links, both languages, every example executed, every message explained, the rooms
	$(BIN)/python -m pytest tests/project/test_docs.py tests/project/test_messages.py tests/project/test_rooms.py tests/ground/test_internals.py $(ARGS)

# not --quiet: --strict would see no warnings then
site: $(SITE)/.ready ## the pages as a website in site/, which needs no server: open site/index.html
	@$(SITE)/bin/python website/pages.py
	@rm -rf site
	@for language in en zh; do \
	  NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --config-file website/pages/$$language.yml || { rm -rf site; exit 1; }; \
	done
	@sed -i 's/o<t$(CUT)/o<=t$(CUT)/' $(SEARCH) && grep -q 'o<=t$(CUT)' $(SEARCH) || { echo "The theme's search is another one: see CUT"; rm -rf site; exit 1; }

# mkdocs-material 9.8.2 looks for the words in Chinese without their last character, so that 内存 finds whatever begins with 内.
CUT    := \.length;o++)t\.slice(s,o)in
SEARCH := site/zh/assets/javascripts/workers/search.*.js

# The theme takes two scripts from unpkg.com, unless they are there: mermaid draws diagrams, the other one searches without a server.
$(SITE)/.ready: $(CACHE)/uv/bin/uv
	@rm -rf "$(SITE)" && $(PYTHON) -m venv --without-pip "$(SITE)"
	@$(CACHE)/uv/bin/uv pip install --python $(SITE)/bin/python --quiet --group site
	@if command -v npm >/dev/null; then \
	  cd "$(SITE)" && mkdir js && npm pack --silent mermaid@11.17.2 iframe-worker@1.0.4 >/dev/null && \
	  tar -xzOf mermaid-*.tgz package/dist/mermaid.min.js > js/mermaid.min.js && \
	  tar -xzOf iframe-worker-*.tgz package/shim/index.js > js/iframe-worker.js && rm *.tgz; \
	else echo "No npm: the site's diagrams, and its search from disk, will need unpkg.com."; fi
	@touch $@

architectures: setup ## write the table of architectures in docs/ from what the tests find with the installed transformers
	CUDA_VISIBLE_DEVICES= PYTHONPATH=tests $(BIN)/python -m helpers.architectures

pictures: setup ## the pictures of the web pages in docs/images, on a machine that does nothing else
	CUDA_VISIBLE_DEVICES= PYTHONPATH=tests $(BIN)/python -m helpers.pictures

soak: setup ## memory and answers over TURNS short turns, and a hundredth as many loads
	LLAMAFACTORY_KT_SOAK_TURNS=$(TURNS) $(BIN)/python -m pytest tests/project/test_soak.py -rP --timeout=0 $(ARGS)

format: setup ## let ruff put the sources in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments
	rm -rf "$(CACHE)"/env-* "$(CACHE)"/site-*
