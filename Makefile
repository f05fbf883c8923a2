# Every target sets up what it needs, says what it does, and is safe to run again.
# Needs: make, a POSIX shell, and Python 3.11, 3.12 or 3.13.

VENV    ?= .venv
PYTHON  ?=
WORKERS ?= 3
# Which pins to install with; empty for none (a GPU user's own torch). The choice is kept in the
# environment, so `make setup CONSTRAINTS=` followed by a plain `make test` does not undo it.
CONSTRAINTS ?= $(shell cat $(VENV)/.constraints 2>/dev/null || echo constraints.txt)
PYTEST_ARGS ?=
# The other end of what pyproject.toml allows: an environment of its own, and what it tests there:
# whatever meets another library's interface, one file or test for each way. What is ours alone (how
# folds are made, whether the engine's knobs change a token) is no other with older libraries.
# Images need the extra media, which it leaves out.
OLDEST        ?= .venv-oldest
OLDEST_PYTHON ?= python3.11
OLDEST_TORCH  ?= 2.11.0
OLDEST_TESTS  ?= tests/test_config.py tests/hf/test_arguments.py tests/hf/test_backbone.py \
	tests/hf/test_cache.py tests/hf/test_convert_gguf.py tests/hf/test_convert_llama.py \
	tests/hf/test_convert_relatives.py::test_logits_are_the_source_s \
	tests/hf/test_export_hf.py::test_every_model_loads_without_mor \
	tests/hf/test_export_llama.py tests/hf/test_foreign.py tests/hf/test_generate.py \
	tests/hf/test_heads.py tests/hf/test_llama_parity.py tests/hf/test_load.py \
	tests/hf/test_save_load.py \
	tests/hf/test_torch_export.py::test_rows_and_tokens_may_change \
	tests/hf/test_torch_export.py::test_a_routed_model_says_why_not \
	tests/engine/test_text.py tests/engine/test_sampler.py tests/engine/test_attend.py \
	tests/engine/test_equal_generate.py::test_end_of_text_ends_as_in_generate \
	tests/engine/test_equal_generate.py::test_float32_and_bfloat16_run_through \
	tests/train/test_label_smoothing.py tests/train/test_trainer.py tests/train/test_peft.py \
	tests/train/test_sft.py
DEMO_ARGS   ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-done
OLDEST_STAMP := $(OLDEST)/.setup-done-torch-$(OLDEST_TORCH)
# Empty is off. Where the environment turns bytecode off, every test process would rewrite all test
# modules and every process that a test starts would compile the whole package: a minute or two.
export PYTHONDONTWRITEBYTECODE :=
# Expanded once: a shell call inside ?= would otherwise run at every use.
PINS  := $(strip $(CONSTRAINTS))

ifneq ($(PINS),$(strip $(shell cat $(VENV)/.constraints 2>/dev/null || echo constraints.txt)))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test setup-oldest test-oldest test-browser test-ray package smoke check docs format clean distclean

help: ## list the targets
	@echo 'mor: Mixture-of-Recursions language models'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'
	@echo
	@echo 'Options: PYTHON=python3.12 (which Python makes the environment), CONSTRAINTS= (no pins,'
	@echo 'for your own torch), WORKERS=3 (test processes), PYTEST_ARGS="-k router".'

setup: $(STAMP) ## make .venv and install mor with its tools

$(STAMP): pyproject.toml $(PINS) tools/setup.sh
	@sh tools/setup.sh '$(VENV)' '$(PINS)' '$(PYTHON)'
	@echo '$(PINS)' > $(VENV)/.constraints
	@touch $@

demo: $(STAMP) ## train the twins on Shakespeare, compare them, write a report and a passage
	@echo '==> mor demo: 15 minutes at most on 2 cores'
	@$(BIN)/mor demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests (those that need the internet are left out)
	@echo '==> pytest, $(WORKERS) processes'
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-oldest: $(OLDEST_STAMP) ## run what meets other libraries with the oldest versions allowed
	@echo '==> pytest with the oldest versions, $(WORKERS) processes'
	@HYPOTHESIS_PROFILE=few $(OLDEST)/bin/python -m pytest -n $(WORKERS) -m 'not slow and not network' \
		-o cache_dir=.pytest_cache/oldest $(OLDEST_TESTS) $(PYTEST_ARGS)

setup-oldest: $(OLDEST_STAMP) ## make .venv-oldest, with the oldest versions allowed

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt tools/setup.sh
	@sed 's/^torch==.*/torch==$(OLDEST_TORCH)/' constraints-oldest.txt > $(OLDEST).pins
	@sh tools/setup.sh '$(OLDEST)' '$(OLDEST).pins' '$(OLDEST_PYTHON)' data,finetune,gguf,tensorboard,test
	@rm $(OLDEST).pins
	@touch $@

test-browser: $(STAMP) ## run the playground's tests in a Chromium; fetches what they need
	@echo '==> the playground in a browser'
	@sh tools/test_browser.sh '$(VENV)' '$(PINS)' $(PYTEST_ARGS)

test-ray: $(STAMP) ## run the tests of replicas behind Ray Serve; installs Ray (a minute, then 30 s)
	@echo '==> Ray Serve'
	@$(BIN)/python -m pip install --disable-pip-version-check -qq $(PINS:%=--constraint %) -e '.[ray]'
	@$(BIN)/python -m pytest tests/server/test_ray.py tests/server/test_deploy.py $(PYTEST_ARGS)

package: $(STAMP) ## build the source package and the wheel into build/package
	@echo '==> building the package'
	@sh tools/build.sh '$(BIN)/python' build/package

smoke: package ## use the built wheel, beside the libraries of the environment: train, generate, serve
	@echo '==> the wheel in use'
	@sh tools/smoke_test.sh --beside '$(VENV)' build/package/*.whl

check: $(STAMP) ## lint, types, import contracts, twins
	@echo '==> ruff format --check'
	@$(BIN)/ruff format --check .
	@echo '==> ruff check'
	@$(BIN)/ruff check .
	@echo '==> mypy'
	@$(BIN)/mypy
	@echo '==> lint-imports'
	@$(BIN)/lint-imports --no-logo
	@echo '==> twins'
	@$(BIN)/python tools/find_twins.py src

docs: $(STAMP) ## build the documentation into build/site, without the network
	@echo '==> mkdocs build --strict'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo '==> open build/site/index.html'

format: $(STAMP) ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove caches and build leftovers; the environment, runs/ and data stay
	@echo '==> removing caches'
	@rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	@rm -rf .coverage htmlcov src/*.egg-info
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove the environments; runs/ and data stay
	@echo '==> removing $(VENV) and $(OLDEST)'
	@rm -rf $(VENV) $(OLDEST) $(OLDEST).pins
