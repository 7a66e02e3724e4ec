"""An integration whose extra is not installed says what to install."""

import importlib
import sys

import pytest

from hbll_seq.integrations.extras import without_extra


@pytest.mark.parametrize("name, package", [("transformers", "transformers"), ("lm_eval", "lm_eval")])
def test_an_import_without_the_extra_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"hbll_seq.integrations.{name}", raising=False)
    remedy = r'is not installed: pip install "hbll_seq\[hf\]", or in a clone.* pip install -e "\.\[hf\]"'
    with pytest.raises(ImportError, match=f"{package} {remedy}"):
        importlib.import_module(f"hbll_seq.integrations.{name}")


def test_another_module_that_is_missing_is_not_talked_over():
    error = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    assert without_extra(error, ("transformers",), "hf") is error
