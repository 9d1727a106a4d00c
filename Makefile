# Each target sets up whatever a fresh machine needs: `make demo`, `make test`, `make docs`.
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE
export NO_MKDOCS_2_WARNING = 1

.PHONY: demo test lint types unit docs clean

demo: $(VENV)/.base
	$(BIN)/rempart demo

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests docs benchmarks examples README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/pyright

unit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site

# torch first and by its exact pin: that is what makes pip take the CPU build where one is offered
$(VENV)/.base: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e .
	touch $@

# torchattacks declares torchvision, which does not load beside this torch; it works without
# PDF needs Pango, pages a browser, the job table of several machines PostgreSQL: what is absent is not tested
SYSTEM := libpango-1.0-0 libpangoft2-1.0-0 libharfbuzz-subset0 chromium postgresql
$(VENV)/.test: $(VENV)/.base
	@if dpkg -s $(SYSTEM) > /dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "installing $(SYSTEM)"; \
		apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends $(SYSTEM) \
			|| echo "that failed: what needs them is not tested"; \
	else echo "not all of $(SYSTEM) are here: what needs them is not tested"; fi
	$(PIP) -e '.[test,lint]'
	$(PIP) --no-deps torchattacks
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	touch $@
