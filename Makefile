# The first target that is called creates .venv and installs everything;
# later calls install again only after one of INSTALL_INPUTS changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALL_INPUTS := requirements.txt constraints.txt setup.py gplq_mm/version.py \
	tools/dev/install.py tools/dev/steps.py \
	$(wildcard gplq_mm/ops/csrc/*.h gplq_mm/ops/csrc/cpu/*.h gplq_mm/ops/csrc/cpu/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint format clean distclean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r name text; do printf '  make %-11s %s\n' "$$name" "$$text"; done

$(INSTALLED): $(INSTALL_INPUTS)
	@$(PYTHON) tools/dev/install.py
	@touch $@

install: $(INSTALLED) ## Create .venv and install everything into it.
	@:

quickstart: $(INSTALLED) ## Train FP32, then GPLQ, on the embedded data set; print the table.
	@$(RUN) tools/quickstart.py $(ARGS)

test: $(INSTALLED) ## Run the tests that are not slow (more options: ARGS='-k name').
	@$(RUN) -m pytest -m 'not slow' $(ARGS)

test-slow: $(INSTALLED) ## Run the slow tests.
	@$(RUN) -m pytest -m slow $(ARGS)

lint: $(INSTALLED) ## Check the code with ruff.
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(INSTALLED) ## Let ruff fix and format the code.
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean: ## Remove build outputs and caches; keep .venv and work_dirs.
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv too; compiled wheels stay in the user's cache.
	@rm -rf $(VENV) gplq_mm/.mim gplq_mm/*.so
