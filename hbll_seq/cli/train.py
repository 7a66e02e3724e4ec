"""``hbll-seq train``: a training run, as train/lm.py makes it."""

from __future__ import annotations


def main(argv: list[str]) -> int:
    """Train, and return the run's exit code; its options and messages are those of the training run."""
    from hbll_seq.training import language_model

    return language_model.main(argv)
