# Everything runs in .venv, which is made by the first target that needs it and made again when its inputs change.
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DISK := 10
.DEFAULT_GOAL := help
.PHONY: help demo test lint lab serve bench-data bench-train bench-infer bench-serve bench-color bench-quality bench-masks bench-rules bench-search bench-gallery bench-registry bench-scale gpu-check results clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'

# One environment for everything, always made from nothing: pip's resolver loops when it adds pinned packages to an
# environment that has some of them. The time that it took goes into the demo's report.
.venv/ready: setup.py settings.ini constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "pillsnap needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 1; }
	@[ -e .venv/ready ] || rm -rf .venv  # of an installation that was cut
	@[ -d .venv ] || $(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free // 10**9; \
		sys.exit(f"pillsnap needs $(DISK) GB of disk for its environment, and {free} GB are free here: make room." \
		if free < $(DISK) else 0)'
	@echo "installing into .venv, which takes about two minutes"
	@start=$$(date +%s); set -e; \
	$(PYTHON) -m venv --clear .venv; \
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]'; \
	if [ -e .git ]; then $(BIN)/pre-commit install > /dev/null || echo "pre-commit could not install its hooks"; fi; \
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 > /dev/null 2>&1; \
	echo $$(( $$(date +%s) - start )) > .venv/install-seconds
	@touch $@

demo: .venv/ready  ## train, evaluate, export and serve on the embedded sample, write runs/demo/report.json
	@$(BIN)/python -m pillsnap demo

test: .venv/ready  ## check that notebooks are clean and exported, run all notebooks and tests
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/run.sh

lint: .venv/ready  ## check format, style and types of notebooks, tests and package
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/lint.sh

lab: .venv/ready  ## open JupyterLab
	@$(BIN)/jupyter lab nbs

.env:
	@umask 077; $(PYTHON) -c 'import secrets; print(f"API_KEY={secrets.token_urlsafe(24)}")' > .env.new \
		&& echo MODEL_PATH=runs/demo/train/export >> .env.new \
		&& mv .env.new .env || { rm -f .env.new; exit 1; }
	@echo "wrote .env with a new API_KEY"

serve: .venv/ready .env  ## serve the demo's model (or MODEL_PATH of .env) on http://127.0.0.1:8000
	@$(BIN)/uvicorn pillsnap.serve:app

bench-data: .venv/ready  ## measure scan, cache and loaders next to others, write runs/bench/data.json (20 GB)
	@$(BIN)/python -m pillsnap.bench.data.main --photos 5000 --labels 1000000 --out runs/bench

bench-train: .venv/ready  ## measure training next to timm and ultralytics, write runs/bench/train.json (OPTIONS=)
	@$(BIN)/python -m pillsnap.bench.training.main --out runs/bench $(OPTIONS)

SIZES := \
	model.classifier.name=tf_efficientnetv2_s.in21k_ft_in1k model.classifier.image_size=384 \
	model.detector.name=yolo11m.yaml model.detector.image_size=640 \
	data.classes=8 identify.box_confidence=0.0005 train.evaluations=1 train.ema_decay=0.98 \
	train.classifier.epochs=1 train.classifier.batch_size=8 train.detector.epochs=1 train.detector.batch_size=4
PRODUCTION := $(SIZES) data.images=320 train.classifier.min_steps=100 train.detector.min_steps=320
# Networks of production size, trained just long enough to know some pills, so that it shows when an engine is wrong.
runs/bench/production/best.pt: | .venv/ready
	@$(BIN)/python -m pillsnap train --profile cpu --run-dir runs/bench/production train.resume=last $(PRODUCTION)

# The same networks, to time a service: what they answer doesn't matter.
runs/bench/timed/export/classifier.onnx: | .venv/ready
	@$(BIN)/python -m pillsnap train --profile cpu --run-dir runs/bench/timed train.resume=last $(SIZES) \
		data.images=48 train.classifier.min_steps=1 train.detector.min_steps=1
	@$(BIN)/python -m pillsnap export --run runs/bench/timed > /dev/null

bench-infer: .venv/ready runs/bench/production/best.pt  ## measure all engines, write runs/bench/infer.json (RUN=)
	@$(BIN)/python -m pillsnap export --run $(or $(RUN),runs/bench/production) --format onnx-int8 > /dev/null
	@$(BIN)/python -m pillsnap bench --run $(or $(RUN),runs/bench/production)

bench-serve: .venv/ready runs/bench/production/best.pt  ## load the service, write runs/bench/serve.json (RUN=)
	@test -e $(or $(RUN),runs/bench/production)/export/classifier.onnx \
		|| $(BIN)/python -m pillsnap export --run $(or $(RUN),runs/bench/production) > /dev/null
	@$(BIN)/python -m pillsnap.bench.serving.main --run $(or $(RUN),runs/bench/production) --out runs/bench $(OPTIONS)

# Training and measuring read datasets with a training and a held-out part: make bench-quality DATA="one two".
bench-quality: .venv/ready  ## judge photos not trained on, write runs/bench/quality.json (DATA= OPTIONS=)
	@$(BIN)/python -m pillsnap.bench.quality.main --data $(DATA) --out runs/bench $(OPTIONS)

bench-color: .venv/ready  ## measure corrections of colour, write runs/bench/color.json (OPTIONS=--data NAME=DIR ...)
	@$(BIN)/python -m pillsnap.bench.color.main --out runs/bench $(OPTIONS)

# A model of the embedded sample, whose handfuls are compared with prescriptions.
runs/bench/sample/export/classifier.onnx: | .venv/ready
	@$(BIN)/python -m pillsnap train --profile cpu --run-dir runs/bench/sample train.resume=last
	@$(BIN)/python -m pillsnap calibrate --run runs/bench/sample --folds 1 > /dev/null
	@$(BIN)/python -m pillsnap export --run runs/bench/sample > /dev/null

# Training and measuring read datasets with a training and a held-out part, and pills that are cut out on black.
bench-masks: .venv/ready  ## outline pills not trained on, write runs/bench/masks.json (OPTIONS=--data NAME=DIR ...)
	@$(BIN)/python -m pillsnap.bench.masks.main --out runs/bench $(OPTIONS)

# The defaults of identify.color and identify.background, on parts of the training photos that are held out.
bench-rules: .venv/ready  ## train with other rules of crops, write runs/bench/rules.json (OPTIONS=--data NAME=DIR ...)
	@$(BIN)/python -m pillsnap.bench.rules.main --out runs/bench $(OPTIONS)

# The photos are not part of the project: OPTIONS="--studio ZIP --data drug1=DIR --data pushin=DIR --phone DIR".
bench-gallery: .venv/ready  ## enrol and ask drugs not trained on, write runs/bench/gallery.json (OPTIONS=--studio ZIP ...)
	@$(BIN)/python -m pillsnap.bench.gallery.main --out runs/bench $(OPTIONS)

# The register is not part of the project: make bench-search REGISTER=FILE.
bench-search: .venv/ready runs/bench/sample/export/classifier.onnx  ## search, write runs/bench/search.json (REGISTER=)
	@$(BIN)/python -m pillsnap.bench.search.main --register $(REGISTER) --run runs/bench/sample --out runs/bench $(OPTIONS)

# On two cores about half an hour, most of it for trainings with and without tracking.
bench-registry: .venv/ready  ## kill pushes, train with tracking, write runs/bench/registry.json (OPTIONS=)
	@$(BIN)/python -m pillsnap.bench.registry.main --out runs/bench $(OPTIONS)

# Two nodes are network namespaces of this machine, which need root.
bench-scale: .venv/ready runs/bench/sample/export/classifier.onnx  ## spread work by Ray, write runs/bench/scale.json
	@$(BIN)/python -m pillsnap.bench.scale.main --run runs/bench/sample --out runs/bench $(OPTIONS)

# On a machine that is lent for minutes nothing is installed: docs/gpu.md.
gpu-check: .venv/ready  ## show what an NVIDIA card gives, write results/gpu-CARD.json (OPTIONS=--dry without a card)
	@$(BIN)/python -m pillsnap.bench.gpu.main $(OPTIONS)

results: .venv/ready  ## publish what was measured here: results/, the tables of README and docs, outputs of the notebooks
	@$(BIN)/python -m pillsnap.bench.publish
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_clean

clean:  ## remove caches and build leftovers; runs, models and data stay
	@rm -rf data/cache build *.egg-info .pytest_cache
