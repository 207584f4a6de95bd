# `make` or `make help` lists what there is. Everything lives in $(VENV); nothing outside this folder is changed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# One constraints file for what is installed and for what builds it: old pip hands PIP_CONSTRAINT to the build, new pip PIP_BUILD_CONSTRAINT.
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -c constraints.txt
INPUTS  := constraints.txt settings.ini setup.py pyproject.toml
STAMPS  := $(addprefix $(VENV)/.installed-,base notebook dev)
base notebook dev: %: $(VENV)/.installed-%

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lab docs readme wheel lock clean distclean base notebook dev
.DELETE_ON_ERROR:

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 picks the interpreter for a new $(VENV). On Linux without an NVIDIA GPU, PyTorch's CPU index in"
	@echo "  PIP_EXTRA_INDEX_URL saves some gigabytes of CUDA libraries (see CONTRIBUTING.md)."

demo: base  ## the whole pipeline on the embedded default, into runs/demo; ends by naming the report
	$(BIN)/slm_begin run --recipe demo --out runs/demo

test: dev  ## everything CI runs: lint, notebooks, pytest, README, site
	PATH="$(abspath $(BIN)):$$PATH" tools/check.sh

test-fast: dev  ## lint, clean + export, and the quick part of pytest
	PATH="$(abspath $(BIN)):$$PATH" tools/check.sh fast

lab: notebook  ## JupyterLab on the quickstart notebook
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" nbs/tutorials/quickstart.ipynb $(LAB_ARGS)

docs: dev  ## the documentation site, with Quarto where it is installed
	@PATH="$(abspath $(BIN)):$$PATH"; export PATH; \
	if command -v quarto >/dev/null; then nbdev_docs && echo "docs: _docs/index.html"; \
	else python tools/nb2md.py site && NO_MKDOCS_2_WARNING=1 mkdocs build --strict -f _site_src/mkdocs.yml && echo "docs: _site/index.html"; fi

readme: dev  ## write README.md from nbs/index.ipynb
	PATH="$(abspath $(BIN)):$$PATH" python tools/nb2md.py readme

wheel: dev  ## build the sdist and the wheel into dist/
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m build

lock:  ## renew constraints.txt with uv, keeping what still fits (UPGRADE=1 takes the newest)
	uv pip compile setup.py --all-extras --universal --python-version 3.10 --quiet --no-header --no-annotate $(if $(UPGRADE),--upgrade) -o constraints.txt
	@{ echo "# The exact versions that are tested together, for CPython 3.10-3.13; made by \`make lock\`. Use: pip install -c constraints.txt -e ."; \
	   echo "# Without the CUDA libraries: each build of torch names its own."; \
	   grep -vE "^(#|nvidia-|cuda-|triton)|== 'emscripten'" constraints.txt | sed -E "s/sys_platform != 'emscripten' and //; s/( and| ;) sys_platform != 'emscripten'//"; } >constraints.new && mv constraints.new constraints.txt

clean:  ## remove what builds and tests leave behind; keeps runs/ and $(VENV)
	rm -rf _proc _docs _site _site_src build dist *.egg-info .pytest_cache .ruff_cache
	find . \( -path ./$(VENV) -o -path ./.git -o -path ./runs \) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

distclean: clean  ## the same and $(VENV)
	rm -rf $(VENV)

# An installation is a stamp file: made again only when what it was made from changed.
$(VENV)/.installed-notebook: EXTRAS := [notebook]
$(VENV)/.installed-dev: EXTRAS := [notebook,dev,eval,search]
$(STAMPS): $(INPUTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"slm_begin needs Python 3.10 or newer; this is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.$(EXTRAS)'
	@touch $@ $(if $(EXTRAS),$(VENV)/.installed-base) $(if $(findstring dev,$(EXTRAS)),$(VENV)/.installed-notebook)
