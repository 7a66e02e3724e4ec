"""What a step of training/trainer.py does to the gradient, seen by the optimizer."""

import kill_and_resume as kr
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def seen():
    """Norms of the gradients that the optimizers were given."""
    norms = []

    def look(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))

    handle = register_optimizer_step_pre_hook(look)
    yield norms
    handle.remove()


@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_the_gradient_is_clipped_before_the_step(lm_options, tmp_path, seen, clip):
    options = ["--objective", "backprop", "--grad-accum", "2", "--max-steps", "3", "--clip", str(clip)]
    assert kr.load_script().main([*lm_options, *options, "--output-dir", str(tmp_path / "run")]) == 0
    whole = [row["grad_norm"] for row in kr.lines(tmp_path / "run")]  # before the clipping
    assert len(whole) == len(seen) == 3 and min(whole) > 0.1
    assert seen == pytest.approx([clip] * 3 if clip else whole, rel=1e-3)
