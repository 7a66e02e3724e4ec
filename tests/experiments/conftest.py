"""Makes the scripts of ``train/experiments`` importable, and what several of their tests share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "train" / "experiments"))


@pytest.fixture(autouse=True)
def same_threads():
    """Scripts set torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stored_results() -> Path:
    """The folder of stored results."""
    return ROOT / "train" / "results"
