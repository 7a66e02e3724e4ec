"""The command line ``hbll-seq``: a file for each command. torch is imported when a command runs, not for its help."""

from hbll_seq.cli.program import main

__all__ = ["main"]
