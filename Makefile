# `make` lists what there is. PYTHON names the interpreter of the environment, ARGS goes to the program:
#   make train ARGS="adapter.rank=8 data=folder data.root=photos"

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.dev

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(DEV) ## create .venv and install everything into it, tools and tests' libraries too

# Training needs neither tests nor tools, so it does not wait for them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: minutes, and several GB where pip finds only torch's CUDA build (README, Troubleshooting)"
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: minutes, and several GB where pip finds only torch's CUDA build (README, Troubleshooting)"
	$(BIN)/python -m pip install --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@ $(READY)

.PHONY: train
train: $(READY) ## fine-tune, sample, measure and report: experiment=rank16 on the shipped backbone
	$(BIN)/python train.py experiment=rank16 $(ARGS)

.PHONY: test
test: $(DEV) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

.PHONY: lint
lint: $(DEV) ## style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(DEV) ## type hints (mypy)
	$(BIN)/mypy

.PHONY: backbone
backbone: $(READY) ## train on from the shipped studio backbone, which it writes over (5 hours; resumes)
	for step in autoencoder denoiser card; do $(BIN)/python -m lora_dae.backbone.studio $$step $(ARGS) || exit; done

.PHONY: classifier
classifier: $(READY) ## train the shipped attribute classifier anew
	$(BIN)/python -m lora_dae.evaluation.attributes.recipe $(ARGS)

SAME_LAYERS := floor ours "PEFT, same layers"

.PHONY: bench
bench: $(DEV) ## measure speed and size (benchmarks/README.md)
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks.steps --memory
	$(BIN)/python -m benchmarks.steps --memory --model sd15 --batch 1 --rows $(SAME_LAYERS) --output build/steps_sd15.json
	$(BIN)/python -m benchmarks.train_speed
	$(BIN)/python -m benchmarks.adapter
	$(BIN)/python -m benchmarks.adapter --models sd15-32 --steps 4 --repeats 3 --output build/adapter_sd15.json
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.ddp

.PHONY: bench-compare
bench-compare: $(READY) ## what moved beyond noise: make bench-compare OLD=a.json NEW=b.json
	$(BIN)/python -m benchmarks.compare $(OLD) $(NEW)

.PHONY: ci
ci: lint types test ## what has to pass before a change lands

.PHONY: clean
clean: ## remove .venv and tool caches (runs/, cache/ and build/ stay)
	rm -rf .venv dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
