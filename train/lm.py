"""Train a hierarchical block-local language model.

By hand: ``accelerate launch train/lm.py [--preset NAME] [options]``.

What it does is in the library: ``hbll_seq/training/language_model.py``. Here is what must come before torch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before torch loads OpenMP: spinning threads crawl on cores that other programs use too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a signal ends the process without a traceback also while it imports, and after the run; `nohup` is obeyed
    for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        _number = getattr(signal, _name, None)
        if _number and not (_name == "SIGHUP" and signal.getsignal(_number) == signal.SIG_IGN):
            signal.signal(_number, lambda number, _: os._exit(128 + number))

from hbll_seq.training.language_model import main

if __name__ == "__main__":
    sys.exit(main())
