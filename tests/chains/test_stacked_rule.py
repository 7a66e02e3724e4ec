"""Which blocks are stacked: what must not be, what is refused, and the rule that follows from the benchmark."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from hbll_seq.chains.stacked import StackedBlocks, pays
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.recurrent_block import RecurrentBlock

MEASURED = Path(__file__).resolve().parents[2] / "train" / "results" / "bench_stacked.json"
WIDTH, N_HEAD = 24, 4


def blocks_of(n, width=WIDTH, **options):
    return [TransformerBlock(width, N_HEAD, window=64, **options).double() for _ in range(n)]


class Subclass(TransformerBlock):
    pass


def _own_forward(blocks):
    blocks[1].forward = lambda x: (x, None)


def _own_method_of_a_part(blocks):
    blocks[1].mlp_in.forward = lambda x: x


def _own_activation(blocks):
    blocks[2]._activate = lambda x: x


def _tied(blocks):
    blocks[1].qkv.weight = blocks[0].qkv.weight


def _tied_inside(blocks):
    for block in blocks:
        block.norm_mlp.weight = block.norm_attention.weight


CHANGES = {
    "a hook": lambda blocks: blocks[1].register_forward_hook(lambda *_: None),
    "a hook before": lambda blocks: blocks[1].register_forward_pre_hook(lambda *_: None),
    "a hook of a part": lambda blocks: blocks[1].mlp_in.register_forward_hook(lambda *_: None),
    "a hook of gradients": lambda blocks: blocks[1].attention_out.register_full_backward_hook(lambda *_: None),
    "a hook before gradients": lambda blocks: blocks[1].register_full_backward_pre_hook(lambda *_: None),
    "a forward of its own": _own_forward,
    "a part's forward of its own": _own_method_of_a_part,
    "a method of its own": _own_activation,
    "compiled in place": lambda blocks: blocks[1].compile(backend="eager"),
    "compiled": lambda blocks: blocks.__setitem__(1, torch.compile(blocks[1], backend="eager")),
    "another part": lambda blocks: setattr(blocks[1], "mlp_in", nn.Linear(WIDTH, 4 * WIDTH).double()),
    "another part in all": lambda blocks: [setattr(b, "norm_mlp", nn.Identity()) for b in blocks],
    "a bias": lambda blocks: [setattr(b, "qkv", nn.Linear(WIDTH, 3 * WIDTH).double()) for b in blocks],
    "a parameter more": lambda blocks: [b.register_parameter("gate", nn.Parameter(torch.ones(1).double())) for b in blocks],
    "a parametrization": lambda blocks: nn.utils.parametrizations.weight_norm(blocks[1].qkv),
    "another norm": lambda blocks: setattr(blocks[1], "norm_mlp", nn.LayerNorm(WIDTH).double()),
    "another eps": lambda blocks: setattr(blocks[1].norm_mlp, "eps", 1e-3),
    "queries of another eps": lambda blocks: [setattr(b.norm_q, "eps", 1e-3) for b in blocks],
    "another window": lambda blocks: setattr(blocks[1], "window", 5),
    "another precision": lambda blocks: blocks[1].float(),
    "mixed precision": lambda blocks: [b.norm_mlp.float() for b in blocks],
    "a tied parameter": _tied,
    "tied inside": _tied_inside,
    "the same block twice": lambda blocks: blocks.__setitem__(1, blocks[0]),
    "another width": lambda blocks: blocks.__setitem__(1, blocks_of(1, width=32)[0]),
    "other heads": lambda blocks: blocks.__setitem__(1, blocks_of(1, n_kv_head=2)[0]),
    "a subclass": lambda blocks: blocks.__setitem__(1, Subclass(WIDTH, N_HEAD, window=64).double()),
    "recurrent": lambda blocks: blocks.__setitem__(slice(None), [RecurrentBlock(WIDTH, "gru") for _ in range(3)]),
    "layers": lambda blocks: blocks.__setitem__(slice(None), [nn.Linear(4, 4) for _ in range(3)]),
    "none": lambda blocks: blocks.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_cannot_be_stacked_is_none(change):
    blocks = blocks_of(3, qk_norm=True)
    assert StackedBlocks.of(blocks) is not None
    change(blocks)
    assert StackedBlocks.of(blocks) is None


def test_hooks_on_all_modules_are_called_by_the_loop_alone():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert StackedBlocks.of(blocks_of(2)) is None
    finally:
        handle.remove()
    assert StackedBlocks.of(blocks_of(2)) is not None


def test_dropout_is_stacked_only_where_it_drops_nothing():
    blocks = blocks_of(2, dropout=0.5)
    assert StackedBlocks.of(blocks) is None
    for block in blocks:
        block.eval()
    assert StackedBlocks.of(blocks) is not None


def test_parameters_of_inference_mode_have_no_counters():
    with torch.inference_mode():
        blocks = blocks_of(2)
    assert StackedBlocks.of(blocks) is None


@pytest.mark.parametrize("rows, shape, message", [
    ([0, 1], (3, 2, 4, WIDTH), r"shape \(3, 2, 4, 24\) for 2 rows: must be \[2, batch, tokens, 24\]"),
    ([0, 1], (2, 4, WIDTH), "for 2 rows: must be"),
    ([0, 1], (2, 2, 4, 8), "tokens, 24"),
    ([], (0, 2, 4, WIDTH), "one row or more"),
    ([0, 3], (2, 2, 4, WIDTH), r"rows=\[0, 3\]: there are 3 blocks, name rows from 0 to 2"),
    ([-1, 0], (2, 2, 4, WIDTH), r"rows=\[-1, 0\]"),
])  # fmt: skip
def test_refuses_shapes_and_rows(rows, shape, message):
    with pytest.raises(ValueError, match=message):
        StackedBlocks.of(blocks_of(3))(rows, torch.zeros(shape, dtype=torch.float64))


def test_refuses_states_of_another_precision():
    with pytest.raises(ValueError, match=r"states of torch.float32: the blocks are of torch.float64"):
        StackedBlocks.of(blocks_of(3))([0], torch.zeros(1, 2, 4, WIDTH))


# ------------------------------------------------------------------------------------------------------ the rule


def test_the_rule_takes_what_was_measured_to_be_faster():
    stored = json.loads(MEASURED.read_text())
    assert stored["setting"]["device"] == "cpu" and stored["setting"]["threads"] == 1
    chosen = [row for row in stored["rows"] if pays(row["rows"], row["batch"], row["tokens"], row["width"], "cpu")]
    assert len(chosen) > len(stored["rows"]) / 2
    for row in chosen:
        assert row["step"]["gain"] >= 1.05
        assert min(row[name]["gain"] for name in ("forward", "vjp", "gradients")) >= 0.95  # whatever a caller does with it


def test_the_rule_is_monotone():
    """More rows are never worse; larger batches, sequences and blocks are never better."""
    sizes = [(2, 3, 8, 50), (1, 2, 4, 7), (1, 8, 30, 128, 129, 1000), (8, 32, 100, 256, 264, 4096)]
    for rows, batch, tokens, width in product(*sizes):
        if pays(rows, batch, tokens, width, "cpu"):
            assert pays(rows + 1, batch, tokens, width, "cpu")
        else:
            assert not any((pays(rows, batch + 1, tokens, width, "cpu"), pays(rows, batch, tokens + 1, width, "cpu"),
                            pays(rows, batch, tokens, width + 8, "cpu")))  # fmt: skip


def test_the_rule_says_no_for_one_row_for_what_was_not_measured_and_elsewhere():
    assert pays(2, 1, 8, 32, "cpu") and pays(2, 1, 8, 32, torch.device("cpu"))
    assert not pays(1, 1, 8, 32, "cpu")
    assert not pays(2, 1, 8, 32, "cuda") and not pays(2, 1, 8, 32, torch.device("meta"))
    assert not pays(2, 1, 129, 32, "cpu") and not pays(2, 1, 8, 264, "cpu") and not pays(2, 4, 128, 128, "cpu")
