"""File operations of the code under test, one by one."""

import builtins
import io
import os
from contextlib import contextmanager

CALLS = [(os, name) for name in ("replace", "rename", "link", "mkdir", "unlink", "rmdir", "fsync", "chmod", "open")]
CALLS += [(builtins, "open"), (io, "open")]


@contextmanager
def intercepted(before, calls=CALLS):
    """``before()`` is called before every file operation."""
    originals = [(module, name, getattr(module, name)) for module, name in calls]
    busy = []

    def wrap(function):
        def call(*args, **kwargs):
            if not busy:
                busy.append(True)
                try:
                    before()
                finally:
                    busy.clear()
            return function(*args, **kwargs)

        return call

    try:
        for module, name, function in originals:
            setattr(module, name, wrap(function))
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)
