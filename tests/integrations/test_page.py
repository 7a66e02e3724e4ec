"""The Python blocks of docs/integrations.md run, in order."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("lm_eval", reason="needs the extra [hf]")

from helpers.language_models import TOKENIZER, model_of  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_of(TOKENIZER).save_pretrained("runs/lm")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert len(blocks) == 5 and names["loss"] > 0 and names["wrapped"].path == names["lm"].path == (4, 6, 7)
