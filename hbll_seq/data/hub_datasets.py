"""A dataset of the Hugging Face Hub, or of its cache where the Hub does not answer. One quick question comes first: the
datasets library asks six times over, for half a minute, before it says that there is no network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

#: seconds that the Hub has for the first answer
PATIENCE = 5.0


def load_hub_dataset(name: str, *config: str | None, **options: Any) -> Any:
    """``datasets.load_dataset``, which does not look for a Hub that does not answer.

    Raises:
        Exception: of many types, as ``datasets.load_dataset``; a ConnectionError where neither Hub nor cache has it.
    """
    import datasets  # takes seconds; only these sources need it

    with contextlib.nullcontext() if hub_answers() else _offline(datasets):
        return datasets.load_dataset(name, *config, **options)


def hub_answers() -> bool:
    """Whether there is an answer, of whatever kind, within PATIENCE seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of the HTTP library that huggingface_hub is built on, or offline mode is set
        return False
    return True


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
