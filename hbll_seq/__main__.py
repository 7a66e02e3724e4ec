"""``python -m hbll_seq`` does what ``hbll-seq`` does."""

import sys

from hbll_seq.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
