"""The README's Python runs as it stands there (what needs a trained run is tested in test_lm_script.py and test_hub.py)."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "runs/lm" not in block]


def test_there_are_examples_to_run():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0])
def test_examples_run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    gradients = [p.grad for p in names["model"].parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients) and names["logits"].isfinite().all()
