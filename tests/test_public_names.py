"""The public names: imported when asked for, and told alike to Python and to editors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hbll_seq

PACKAGE = Path(hbll_seq.__file__).parent


def test_the_stub_names_the_same_modules():
    """``__init__.pyi`` is what type checkers and editors read."""
    nodes = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8")).body
    told = {alias.asname: node.module for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == hbll_seq._MODULE_OF


def test_every_name_is_there():
    for name in hbll_seq.__all__:
        assert getattr(hbll_seq, name) is getattr(sys.modules[hbll_seq._MODULE_OF[name]], name)
    assert set(hbll_seq.__all__) < set(dir(hbll_seq))
    assert hbll_seq.models.__name__ == "hbll_seq.models"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Generate'"):
        hbll_seq.Generate


def test_the_package_is_imported_without_torch():
    program = "import sys, hbll_seq; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, timeout=60).returncode == 0
