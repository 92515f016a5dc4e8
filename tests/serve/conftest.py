"""These tests need a real vLLM: `make test-serve` runs them in its environment."""

import importlib.util
import os

# Nothing here may ask the network; both are read when vLLM is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Else vLLM has a thread on every core, which it keeps: they would wait for one another, and for whoever else is there.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
