"""The random number generators of a process, as JSON values of a checkpoint."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

_KEYS = 624  # of the Mersenne Twister, which Python and NumPy share


def rng_state() -> dict[str, Any]:
    """State of this process's random number generators (Python, NumPy, torch, the current GPU) as JSON values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    python = random.getstate()
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`rng_state`. Raises ValueError, before anything is changed, where ``state`` is something else."""
    check_rng_state(state)
    random.setstate(_python(state["python"]))
    np.random.set_state(_numpy(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def check_rng_state(state: Any) -> None:
    """Raises ValueError unless :func:`set_rng_state` can take ``state``: it is given to generators that nobody uses."""
    if not isinstance(state, dict) or set(state) != {"python", "numpy", "torch", "cuda"}:
        raise ValueError("the state of the random generators must have the parts python, numpy, torch and cuda")
    trials = {
        "python": lambda values: random.Random().setstate(_python(values)),
        "numpy": lambda values: np.random.RandomState(0).set_state(_numpy(values)),
        "torch": lambda values: torch.Generator().set_state(_bytes(values)),
        "cuda": lambda values: values is None or _try_on_gpu(_bytes(values)),
    }
    for part, attempt in trials.items():
        try:
            attempt(state[part])
        except (ValueError, TypeError, RuntimeError, OverflowError):
            raise ValueError(f"the state of the random generators is wrong in its part {part}") from None


def _try_on_gpu(values: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.Generator("cuda").set_state(values)


def _python(part: Any) -> tuple:
    version, keys, gauss = part
    if type(version) is not int or not isinstance(keys, list) or not _words(keys[:-1]) or not _position(keys[-1]):
        raise ValueError
    return version, tuple(keys), _gauss(gauss)


def _numpy(part: Any) -> tuple:
    kind, keys, position, has_gauss, gauss = part
    if not isinstance(kind, str) or not _words(keys) or not _position(position) or has_gauss not in (0, 1):
        raise ValueError
    return kind, np.array(keys, dtype=np.uint32), position, int(has_gauss), float(_gauss(gauss))


def _words(keys: Any) -> bool:
    return isinstance(keys, list) and len(keys) == _KEYS and all(type(key) is int and 0 <= key < 2**32 for key in keys)


def _position(position: Any) -> bool:
    return type(position) is int and 0 <= position <= _KEYS


def _gauss(gauss: Any) -> float | None:
    if gauss is not None and (isinstance(gauss, bool) or not isinstance(gauss, (int, float)) or not math.isfinite(gauss)):
        raise ValueError
    return gauss


def _bytes(part: Any) -> torch.Tensor:
    if not isinstance(part, str):
        raise TypeError
    return torch.frombuffer(bytearray.fromhex(part), dtype=torch.uint8)
