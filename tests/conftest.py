"""What every test shares: recorded outputs, and traps for unwritten memory."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would mostly wait for each other
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel

SHIPPED = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True, scope="session")
def uninitialised_memory_is_nan():
    """torch.empty holds NaN, so that output which was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """Nothing is written into the user's own cache."""
    os.environ["MINIDIT_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def goldens():
    """Finds the recording of a component: in $MINIDIT_GOLDENS where that is set, else in tests/goldens."""
    return find_golden


def find_golden(component: str) -> Path:
    folder = Path(os.environ.get("MINIDIT_GOLDENS", SHIPPED)) / component
    if not folder.is_dir():
        pytest.fail(f"no recording of {component} in {folder.parent}")
    return folder
