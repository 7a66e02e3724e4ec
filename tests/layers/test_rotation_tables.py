"""The table of rotary angles that all blocks share: the plain arithmetic, whoever asked first and how far a text has gone."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hbll_seq.layers import attention_arithmetic
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_arithmetic import KVState, band, first_tables, later_tables, rotation, turns

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def nobody_asked_before():
    first_tables.cache_clear()
    later_tables.cache_clear()
    band.cache_clear()


def block_of(width=16, n_head=2, **options):
    torch.manual_seed(0)
    block = TransformerBlock(width, n_head, window=6, **options)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return block


def trained(block, x):
    """Gradients of a step."""
    block(x)[0].square().sum().backward()
    return [p.grad.clone() for p in block.parameters()]


def test_angles_are_those_of_the_paper_at_thousands_of_positions():
    """Su et al. 2021: pair d turns by position * base**(-2 d / D). A position in half precision would be off by up to 16."""
    positions = torch.tensor([0, 1, 257, 4097, 8191])
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotation(positions, 8, 10000.0)
    for row, position in enumerate(positions.tolist()):
        angles = [position * 10000.0 ** (-2 * d / 8) for d in range(4)]
        assert cos[row].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-3)
        assert sin[row].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-3)


@pytest.mark.parametrize("first, n", [(0, 1), (0, 256), (0, 257), (3, 5), (250, 20), (8190, 5), (8192, 1), (3 * 8192 - 1, 2),
                                      (0, 9000), (5000, 20000), (10**7, 3)])  # fmt: skip
@pytest.mark.parametrize("width, base", [(8, 10000.0), (4, 100.0)])
def test_the_table_holds_the_angles(first, n, width, base):
    table = turns(first, first + n, width, base, CPU)
    here = table.rows(first, first + n)
    cos, sin, both = table.cos[here], table.sin[here], table.both[here]
    expected = rotation(torch.arange(first, first + n), width, base)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])
    assert torch.equal(both, torch.complex(*expected)) and cos.dtype == torch.float32


def test_all_blocks_share_it_and_another_base_has_its_own():
    tables = [turns(first, first + 9, 8, 10000.0, CPU) for first in (0, 7, 240)]
    assert all(table is tables[0] for table in tables)
    assert turns(0, 9, 8, 100.0, CPU) is not tables[0]


def test_a_table_that_a_graph_may_read_is_not_dropped_for_others():
    table = turns(0, 9, 8, 10000.0, CPU)
    for number in range(40):
        turns(0, 9, 8, 2.0 + number, CPU)
    assert turns(0, 9, 8, 10000.0, CPU) is table


def test_how_far_a_text_has_gone_costs_no_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(attention_arithmetic, "rotation", lambda positions, *rest: (
        asked.append(len(positions)) or rotation(positions, *rest)))  # fmt: skip
    block, x = block_of(), torch.randn(1, 3, 16)
    far = 10**7
    with torch.no_grad():
        output, state = block(x, KVState(seen=far))
        decoder = block.eval().decoder()
        decoder.length = decoder._first = far
        decoder.step(x[:, 0])
    assert state.seen == far + 3 and max(asked) <= 2 * attention_arithmetic.STRETCH
    for position in range(0, 40 * attention_arithmetic.STRETCH, attention_arithmetic.STRETCH):
        turns(position, position + 1, 8, 10000.0, CPU)
    assert later_tables.cache_info().currsize <= 16 and first_tables.cache_info().currsize == 1


@pytest.mark.parametrize("few", [True, False])
def test_a_decoder_goes_on_where_a_table_ends_and_back_again(monkeypatch, few):
    monkeypatch.setattr(attention_arithmetic, "STRETCH", 16)
    block, x = block_of().eval(), torch.randn(1, 40, 16)
    with torch.no_grad():
        expected, decoder = block(x)[0], block.decoder(rollback=12)
        if not few:
            decoder._prepared = None
        found = [decoder.step(x[:, t]) for t in range(20)]
        decoder.truncate(10)
        found[10:] = decoder.read(x[:, 10:15]).unbind(1)  # before the table of the last step
        found += decoder.read(x[:, 15:33]).unbind(1)
        found += [decoder.step(x[:, t]) for t in range(33, 40)]
    assert torch.allclose(torch.stack(found, dim=1), expected, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_whoever_asks_first_training_is_the_same(mode):
    x = torch.randn(2, 9, 16)
    expected = trained(block_of(), x)
    first_tables.cache_clear()
    block = block_of()
    with mode():
        block(x)
    assert first_tables.cache_info().currsize == 1 and all(map(torch.equal, trained(block, x), expected))


def test_who_asked_for_shapes_alone_leaves_nothing_behind():
    x = torch.randn(2, 9, 16)
    with FakeTensorMode():
        assert block_of()(torch.zeros(2, 9, 16))[0].shape == (2, 9, 16)
    assert len(trained(block_of(), x)) > 0 and first_tables.cache_info().currsize == 1


def test_who_asks_for_shapes_alone_gets_them_though_the_table_is_there():
    block_of()(torch.randn(2, 9, 16))
    with FakeTensorMode():
        assert block_of()(torch.randn(2, 9, 16))[0].shape == (2, 9, 16)


def test_a_mask_lies_where_its_reader_does():
    block, x = block_of().eval(), torch.randn(1, 4, 16)
    with torch.no_grad():
        expected = block.decoder().read(x)
        band.cache_clear()
        with torch.device("meta"):  # where tensors without a device of their own are made
            assert torch.equal(block.decoder().read(x), expected)
        assert torch.equal(block.decoder().read(x), expected)


def test_a_block_is_copied_and_stored_without_its_table():
    block, x = block_of(), torch.randn(2, 9, 16)
    expected = block(x)[0]
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(other(x)[0], expected)
    assert not list(block.buffers()) and not any("table" in name for name in vars(block))


def test_a_block_that_changes_its_dtype_keeps_its_angles():
    block, x = block_of(), torch.randn(2, 9, 16)
    expected = block(x)[0]
    block.double()
    assert (block(x.double())[0] - expected).abs().max() < 1e-4
    assert block.float()(x)[0].dtype == torch.float32 and torch.equal(block(x)[0], expected)


def test_a_compiled_block_makes_its_angles_itself():
    block, x = block_of(), torch.randn(2, 9, 16)
    expected = block(x)[0]
    first_tables.cache_clear()
    compiled = torch.compile(block, backend="eager")
    assert torch.allclose(compiled(x)[0], expected, atol=1e-6) and first_tables.cache_info().currsize == 0
