# Two commands do all the set-up: `make demo` and `make test`. Both work on a CPU and without the Hub.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
# Threads that wait sleep: spinning, they slow down whatever else runs beside them, a server's test its client.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow test-gpu quality format clean

# torch first, by itself: what the other packages ask of it is then met already.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(READY)
	mkdir -p build
	$(BIN)/cosyq quantize mini --device cpu --force
	$(BIN)/cosyq synth "This is a small model, and you can hear what it says." -a artifacts/cosyq-mini -o build/demo.wav --seed 1 --device cpu
	@echo "Listen to build/demo.wav."

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Full size: needs 10 GB of disk and minutes.
test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# On a CUDA machine: the engine fused against the reference, at full size. Needs 10 GB of disk.
test-gpu: $(READY)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu tests/gpu

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint Dockerfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .venv artifacts/cosyq-mini
