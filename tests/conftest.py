"""What every test shares: at most two threads, fixed seeds, fresh memory that is not zero by luck."""

import os
import random

import numpy as np
import pytest
import torch

from multibeta.kernels import cpp

os.environ.setdefault("MULTIBETA_CACHE", str(cpp.cache_folder()))  # tests that move XDG_CACHE_HOME compile nothing anew
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Global generators start every test alike."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_empty():
    """Memory from `torch.empty` and its kin holds NaN, so that an element never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
