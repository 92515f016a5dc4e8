"""`make test-gpu` runs this folder; on a machine without a GPU there is nothing in it."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
