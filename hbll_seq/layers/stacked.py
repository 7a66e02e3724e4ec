"""placeholder"""
from __future__ import annotations


def stacked_decoder(blocks, start, rollback):
    """None."""
    return None
