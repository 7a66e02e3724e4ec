"""``hbll-seq train``: a training run, as train/lm.py makes it."""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Train, and return the run's exit code; options, messages and signals are those of the training run."""
    from hbll_seq.training import language_model

    before, sys.argv[0] = sys.argv[0], "hbll-seq train"  # how its help and its messages call it
    try:
        return language_model.main(argv)
    finally:
        sys.argv[0] = before
