# The first target that is called creates .venv and installs what it needs: classifiers need no
# operator of mmcv, detectors a few that are compiled, the rest the tools of development too.
# Later calls install again only after one of INSTALL_INPUTS changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
FOR_CLASSIFIERS := $(VENV)/.classifiers
FOR_DETECTORS := $(VENV)/.detectors
INSTALLED := $(VENV)/.development
INSTALL_INPUTS := requirements.txt constraints.txt setup.py gplq_mm/version.py \
	$(addprefix tools/dev/,install.py steps.py mmcv_sources.py mmcv_ext.py) \
	$(wildcard gplq_mm/ops/csrc/*.h gplq_mm/ops/csrc/cpu/*.h gplq_mm/ops/csrc/cpu/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-det test test-slow test-asan lint format docs clean distclean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
		while IFS='|' read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

$(FOR_CLASSIFIERS) $(FOR_DETECTORS) $(INSTALLED): $(INSTALL_INPUTS)
	@$(PYTHON) tools/dev/install.py $(patsubst .%,%,$(notdir $@))
	@touch $@

# Always looks, since variables such as GPLQ_MM_MMCV_OPS decide too.
install: ## Create .venv and install everything into it.
	@$(PYTHON) tools/dev/install.py development
	@touch $(INSTALLED)

quickstart: $(FOR_CLASSIFIERS) ## Train FP32, then GPLQ, on the embedded data set; print the table.
	@$(RUN) tools/quickstart.py $(ARGS)

quickstart-det: $(FOR_DETECTORS) ## The same with a detector, on scenes of the digits.
	@$(RUN) tools/quickstart.py --model mask-rcnn $(ARGS)

# A process for each core with one thread each; the tests of a file share its fixtures.
test: $(INSTALLED) ## Run the tests that are not slow (more options: ARGS='-k name').
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow' $(ARGS)

test-slow: $(INSTALLED) ## Run the slow tests.
	@$(RUN) -m pytest -m slow $(ARGS)

# The compiler of the kernels finds its sanitizers; their libraries must be loaded first.
ASAN_FLAGS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all \
	-fno-omit-frame-pointer
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))

test-asan: $(INSTALLED) ## Run the kernels' tests under AddressSanitizer and UBSan.
	@GPLQ_MM_CXXFLAGS='$(ASAN_FLAGS)' GPLQ_MM_LDFLAGS='-fsanitize=address,undefined' $(RUN) \
		setup.py -q build_ext --build-lib build/asan --build-temp build/asan-objects
	@LD_PRELOAD='$(call CXX_FILE,libasan.so) $(call CXX_FILE,libstdc++.so)' \
		ASAN_OPTIONS=detect_leaks=0 GPLQ_MM_LIBRARY='$(CURDIR)/build/asan/gplq_mm/_C.abi3.so' \
		$(RUN) -m pytest -p no:cacheprovider -k 'not environment and not unknown' \
		tests/test_ops/test_int4_linear.py tests/test_ops/test_fused.py \
		tests/test_ops/test_attention.py tests/test_families/test_fused.py $(ARGS)

lint: $(INSTALLED) ## Check the code with ruff.
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: $(INSTALLED) ## Let ruff fix and format the code.
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

docs: $(INSTALLED) ## Build the documentation into build/docs (open index.html).
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

clean: ## Remove build outputs and caches; keep .venv and work_dirs.
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Remove .venv too; compiled wheels stay in the user's cache.
	@rm -rf $(VENV) gplq_mm/.mim gplq_mm/*.so
