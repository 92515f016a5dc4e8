"""These tests need a real vLLM: `make test-serve` runs them in its environment."""

import importlib.util
import os

# Nothing here may ask the network; both are read when vLLM is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
