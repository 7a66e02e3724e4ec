"""Methods of a comparison whose K and M follow probes: named, told apart from those without, and run."""

import pytest

from comparisons.depth_methods import DepthMethod
from comparisons.runs import DepthShape, train_depth
from comparisons.tasks import SyntheticTask
from hbll_seq.data.tasks import make_task

PLAIN = "sweeps:forward=0,backward=0"


def test_a_control_is_part_of_a_method_with_all_of_its_options():
    plain, asked = (DepthMethod.named(name, n_level=2) for name in (PLAIN, f"{PLAIN},control=adaptive(every=2)"))
    assert "control" not in plain.description and asked.work() == plain.work()
    assert "'control': 'adaptive(tolerance=0.02, most=None, every=2)'" in asked.description
    same = DepthMethod.named(f"{PLAIN},control=adaptive(every=2,tolerance=0.02)", n_level=2)
    assert same.description == asked.description
    assert DepthMethod.named(f"{PLAIN},control=adaptive", n_level=2).description != asked.description
    assert DepthMethod.named(f"{PLAIN},control=none", n_level=2).description == plain.description
    with pytest.raises(ValueError, match="control='adapt'"):
        DepthMethod.named("sweeps:control=adapt").check()


@pytest.mark.parametrize("mix", ["", ",depth_mix=octaves"])
def test_a_run_is_compared_at_its_k_and_m_of_the_time_and_a_mix_does_not_hide_the_main_path(mix):
    """With the mix the whole gradient is never off by as much as the tolerance, that of the main path is."""
    method = DepthMethod.named(f"{PLAIN},control=adaptive(tolerance=0.01,every=1){mix}", n_level=2)
    shape = DepthShape(2, 16, 2, batch_size=2, steps=12, warmup_steps=0, eval_batches=1, eval_every=12, alignment_every=1)
    run = train_depth(method, 1e-2, 0, SyntheticTask(make_task("induction", n_symbols=8, context_length=12)), shape)
    assert run["description"] == method.description
    main = [row[-1 if mix else 1] for row in run["alignment"]]
    assert min(main) < 0.99 and main[-1] > 0.99  # fixed, 0.94
    assert not mix or min(row[1] for row in run["alignment"]) > 0.99
