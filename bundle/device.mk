# What a device must prove, and how fast it is: the same targets in the repository and in a bundle.
# They run with the bundle's environment where there is one here, else the repository's, else the python3 of PATH.

DEVICE_PYTHON ?= $(firstword $(wildcard fft-venv/bin/python .venv/bin/python) $(shell command -v python3))
# Groups of tests (see tests/device/run.py) and parts of benchmarks (see benchmarks/device): all, unless named.
GROUP ?=
PART ?=
MINUTES ?= 8
# What is in the names of the benchmarks' cases: any, unless given.
CASE ?=
# Groups of tests at a time, and minutes for all of them.
JOBS ?= 1
TEST_MINUTES ?= 60
# A bare `make` in a bundle.
ifeq ($(.DEFAULT_GOAL),)
.DEFAULT_GOAL := rehearse
endif
# Many images have Python keep nothing of what it compiles; install.sh leaves all of that to the first import, and there
# are dozens of processes.
ON_DEVICE = PYTHONDONTWRITEBYTECODE= PATH="$(dir $(DEVICE_PYTHON)):$$PATH" $(DEVICE_PYTHON)

.PHONY: test-gpu test-npu bench-gpu bench-npu rehearse

test-gpu:  ## what a GPU must prove, group by group; writes gpu-report.json (GROUP=ring chooses)
	@$(ON_DEVICE) tests/device/run.py --device cuda --jobs $(JOBS) --minutes $(TEST_MINUTES) --report gpu-report.json $(if $(GROUP),--group $(GROUP))

test-npu:  ## the same for an Ascend NPU; writes npu-report.json
	@$(ON_DEVICE) tests/device/run.py --device npu --jobs $(JOBS) --minutes $(TEST_MINUTES) --report npu-report.json $(if $(GROUP),--group $(GROUP))

bench-gpu:  ## how fast a GPU trains, in MINUTES=8 a call, the next goes on; writes gpu-bench.json (PART=step chooses)
	@$(ON_DEVICE) -m benchmarks.device --device cuda --minutes $(MINUTES) --results gpu-bench.json $(if $(PART),--part $(PART)) $(if $(CASE),--case "$(CASE)")

bench-npu:  ## the same for an Ascend NPU; writes npu-bench.json
	@$(ON_DEVICE) -m benchmarks.device --device npu --minutes $(MINUTES) --results npu-bench.json $(if $(PART),--part $(PART)) $(if $(CASE),--case "$(CASE)")

rehearse:  ## all of the above on the CPU, in the smallest sizes: so that none of it is broken on arrival
	@rm -f rehearsal-bench.json
	@$(ON_DEVICE) tests/device/run.py --device cpu --report rehearsal-report.json $(if $(GROUP),--group $(GROUP))
	@$(ON_DEVICE) -m benchmarks.device --device cpu --smallest --minutes 60 --results rehearsal-bench.json $(if $(PART),--part $(PART)) $(if $(CASE),--case "$(CASE)")
