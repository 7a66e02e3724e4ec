"""Blocks and cells with plain arguments."""
