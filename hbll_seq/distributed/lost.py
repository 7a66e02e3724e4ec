"""A process of the launch that is gone: how the others notice it, and how one of them alone speaks."""

from __future__ import annotations

from torch import distributed

#: what the collectives' transport says, which raises plain RuntimeErrors over gloo
_SIGNS = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")
_SAID = "hbll_seq/said"  # in the launch's store: how many processes wanted to say how the run ended


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process ended, or did not answer in time."""
    if isinstance(error, getattr(distributed, "DistError", ())):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def is_first_to_speak() -> bool:
    """Whether no other process of the launch has asked this before. Launchers keep the store that is asked; without one it
    ends with the first process, and then the second one speaks."""
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(_SAID, 1) == 1
    except (RuntimeError, ValueError):  # the store's errors are RuntimeErrors
        return distributed.get_rank() == 1
