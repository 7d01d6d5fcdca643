VENV := .venv
PYTHON := $(VENV)/bin/python
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)  # for packages of the system

.PHONY: demo test test-integrations check bench docs gpu gpu-proof rehearse sanitize install clean

demo: install  ## train a small GPT-2 on real text with the tracker on (4 to 6 minutes)
	$(PYTHON) training/run.py --tracker=fast

test: install  ## all tests but tests/integrations, then lint, format and types (5 to 10 minutes)
	$(PYTHON) -m pytest -n 2 --dist=worksteal
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

test-integrations: install  ## with the real Trainer, Lightning, TensorBoard, W&B, Parquet readers, a browser (about 10 minutes)
	$(PYTHON) -m pip install --quiet -c requirements.txt -r requirements-integrations.txt
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { $(ROOT) apt-get update -qq && $(ROOT) apt-get install -yqq --no-install-recommends chromium; }
	$(PYTHON) -m pytest tests/integrations tests/runs tests/checkpoints tests/test_examples.py

check: export SOSD_EVERY = 1
check: export SOSD_TARGETS = 80 90 100 gfx942
check: export SOSD_DRAWS = 10
check: test  ## the same with every case, every kernel for every GPU, a smoke test of the benchmarks
	$(PYTHON) -m pytest -q bench --benchmark-disable
	$(PYTHON) -m bench.svd_overhead --steps 3

bench: install  ## the headline table, and one benchmark a kernel
	$(PYTHON) -m bench.svd_overhead
	$(PYTHON) -m pytest -q bench --benchmark-only

docs: install  ## the site in build/site, without a warning; then links, commands and code blocks of all pages
	$(PYTHON) -m pip install --quiet -c requirements.txt -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	$(PYTHON) -m pytest -q tests/test_docs.py tests/test_site.py

# With the system's python and what it has: torch with CUDA, Triton and, better, CuPy. Nothing is downloaded.
gpu:  ## what a GPU has to prove, in 8 minutes: native tests, then every benchmark; JSON under bench/results/<gpu name>/
	PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --no-deps --no-build-isolation --no-index -e . \
	  || echo "sosd_fast is used from this folder, as it stands; its C++ kernels may be missing."
	python3 -m bench.gpu

rehearse: install  ## every Python line of `make gpu`, at small sizes, on a stub of a GPU (about 6 minutes)
	$(PYTHON) -m bench.gpu --rehearse

# ttsem, an early version, asks for Python 3.12 and runs on 3.11; it is kept apart from what the other tests find.
gpu-proof: install  ## compiled kernels run without a GPU: races, bounds, planted faults (about 2 minutes)
	$(PYTHON) -m pip install --quiet --no-deps --ignore-requires-python --upgrade --target build/gpu-proof ttsem==0.1.0
	PYTHONPATH=$(CURDIR)/build/gpu-proof $(PYTHON) -m pytest -q -n 2 --dist=worksteal tests/kernels/test_proof.py

# 20,000 calls for each instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, 3,000 under ThreadSanitizer.
sanitize: install  ## the C++ kernels under the sanitizers: checks, planted faults, a fuzz (about 25 minutes on 2 cores)
	$(PYTHON) -m pip install --quiet cmake ninja
	for kind in address,undefined thread; do \
	  $(VENV)/bin/cmake -S . -B build/$$kind -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DSOSD_SANITIZE=$$kind >/dev/null && \
	  $(VENV)/bin/cmake --build build/$$kind && build/$$kind/sanitize || exit 1; \
	  for isa in baseline avx2 avx512; do \
	    SOSD_ISA=$$isa build/$$kind/sanitize fuzz $$(test $$kind = thread && echo 3000 || echo 20000) 1 || exit 1; \
	  done; \
	done

install: $(VENV)/installed

$(VENV)/installed: requirements.txt pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/cpu/*)
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sosd_fast needs Python 3.11 or newer")'
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -r requirements.txt
	$(PYTHON) -m pip install --quiet --no-deps -e .
	$(PYTHON) -m sosd_fast doctor
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info sosd_fast/_C*.so
