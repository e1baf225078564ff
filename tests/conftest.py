"""What all tests share."""

import atexit
import gc
import os
import shutil
import tempfile

import torch

# The models are tiny and the cores shared: threads that wait for each other cost more than they compute.
torch.set_num_threads(1)

# What is compiled for the tests goes with them; processes that run some of them, or are started by one, share it.
if "HF_FEDLARGE_TEST_CACHE" not in os.environ:
    os.environ["HF_FEDLARGE_TEST_CACHE"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hf-fedlarge-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_finish(session: object) -> None:
    """What is imported stays: collecting what a test leaves looks at that alone, which is quick."""
    gc.collect()
    gc.freeze()
