"""Decoders against ``forward``: of any cell, of attention with all its options, of recurrent blocks; prepared or not."""

import gc

import pytest
import torch
from torch import nn

from hbll_seq.layers import prepared
from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_decoder import AttentionDecoder
from hbll_seq.layers.base import Cell, CellDecoder, select_rows
from hbll_seq.layers.prepared import FEW_ROWS, PANEL, Matrix, Norm, can_prepare
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.layers.recurrent_decoder import RecurrentDecoder
from hbll_seq.layers.residual import make_norm

WINDOW = 12


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def randomised(block, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for p in block.parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=generator) + (p.dim() == 1))
    return block.to(dtype).eval()


def attention(width=32, n_head=4, **options):
    return TransformerBlock(width, n_head, window=WINDOW, **options)


BLOCKS = {
    "plain": attention,
    "layernorm": lambda: attention(norm="layernorm"),
    "grouped": lambda: attention(n_kv_head=2),
    "one key head": lambda: attention(n_kv_head=1, qk_norm=True),
    "qk_norm": lambda: attention(qk_norm=True),
    "swiglu": lambda: attention(mlp="swiglu"),
    "odd width": lambda: attention(width=24, n_head=2, mlp="swiglu"),  # no panels
    "other base": lambda: attention(rope_base=100.0),
    **{kind: lambda kind=kind: RecurrentBlock(32, kind) for kind in ("gru", "mingru", "elman", "elman-sigmoid")},
    "no mlp": lambda: RecurrentBlock(32, "gru", mlp_ratio=0, norm="layernorm"),
}


class TokenShift(Cell):
    """A user's cell, whose state is inside a dictionary."""

    def __init__(self, width=32):
        super().__init__()
        self.map = nn.Linear(2 * width, width)

    def initial_state(self, start=None):
        return {"before": None, "start": start}

    def forward(self, x, state=None):
        before = (state or {}).get("before")
        first = torch.zeros_like(x[:, :1]) if before is None else before.unsqueeze(1)
        shifted = torch.cat([first, x[:, :-1]], dim=1)
        return x + self.map(torch.cat([x, shifted], dim=-1)).tanh(), {"before": x[:, -1], "start": None}


BLOCKS["a user's"] = TokenShift


def inputs(batch, length, dtype=torch.float32):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)



def read_all(decoder, x, sizes):
    """In calls of these sizes, over and over."""
    parts, t, turn = [], 0, 0
    while t < x.shape[1]:
        size = min(sizes[turn % len(sizes)], x.shape[1] - t)
        parts.append(decoder.step(x[:, t]).unsqueeze(1) if size == 1 else decoder.read(x[:, t : t + size]))
        t, turn = t + size, turn + 1
    assert decoder.length == t
    return torch.cat(parts, dim=1)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), float((a - b).abs().max())


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("batch", [1, 2, FEW_ROWS + 1])
def test_a_decoder_gives_what_forward_gives(name, batch):
    """By steps, by calls of a few tokens and of many, past the window several times; inputs are left as they are."""
    block = randomised(BLOCKS[name]())
    x = inputs(batch, 150)
    x = x[..., :24] if name == "odd width" else x
    expected, given = block(x)[0], x.clone()
    for sizes in ([1], [5, 1, 1], [3], [40, 1, 7], [2, 70]):
        close(read_all(block.decoder(), x, sizes), expected)
    assert torch.equal(x, given)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_double_precision_they_agree_to_double_precision(name):
    """Nothing on the way is rounded to single precision; both take the same single-precision angles."""
    block = randomised(BLOCKS[name](), torch.float64)
    x = inputs(2, 60, torch.float64)
    x = x[..., :24] if name == "odd width" else x
    close(read_all(block.decoder(), x, [6, 1, 1, 3]), block(x)[0], 1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_runs_unprepared(name):
    block = randomised(BLOCKS[name](), torch.bfloat16)
    x = inputs(2, 30, torch.bfloat16)
    x = x[..., :24] if name == "odd width" else x
    expected = block(x)[0].float()
    y = read_all(block.decoder(), x, [4, 1, 1])
    assert y.dtype == torch.bfloat16 and (y.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "a user's"])
def test_padded_rows_equal_each_alone(name):
    block, pads = randomised(BLOCKS[name]()), [0, 3, 9]
    x = inputs(3, 60)
    x = x[..., :24] if name == "odd width" else x
    for sizes in ([10] + 30 * [1], [10, 1, 1, 3], [2, 1]):  # the last reads padding by steps
        y = read_all(block.decoder(torch.tensor(pads)), x, sizes)
        assert y.isfinite().all()
        for row, pad in enumerate(pads):
            close(y[row, pad:], block(x[row : row + 1, pad:])[0][0])


@pytest.mark.parametrize("name", BLOCKS)
def test_what_was_taken_back_was_never_read(name):
    block = randomised(BLOCKS[name]())
    x, noise = inputs(2, 200), torch.randn(2, 8, 32)
    x, noise = (x[..., :24], noise[..., :24]) if name == "odd width" else (x, noise)
    expected, decoder, t = block(x)[0], block.decoder(rollback=8), 0
    while t < 180:
        n = 1 + t % 4
        close(decoder.read(x[:, t : t + n]), expected[:, t : t + n])
        t += n
        for k in range(t % 5):
            decoder.step(noise[:, k])
        decoder.read(noise[:, : 1 + t % 3])
        decoder.truncate(t)
        assert decoder.length == t
    with pytest.raises(ValueError, match="can be taken back"):
        decoder.truncate(100)
    with pytest.raises(ValueError, match="positions have been read"):
        decoder.truncate(t + 1)


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_kept_in_any_order(name):
    block, rows = randomised(BLOCKS[name]()), torch.tensor([2, 0, 2])
    x = inputs(3, 40)
    x = x[..., :24] if name == "odd width" else x
    expected, decoder = block(x)[0], block.decoder()
    read_all(decoder, x[:, :10], [10])
    decoder.step(x[:, 10])
    decoder.keep(rows)
    decoder.truncate(9)
    close(decoder.read(x[rows, 9:12]), expected[rows, 9:12])
    for t in range(12, 40):
        close(decoder.step(x[rows, t]), expected[rows, t])


def test_a_window_that_slides_needs_no_more_memory():
    decoder = randomised(attention()).decoder(rollback=4)
    x, sizes = inputs(1, 400), set()
    for t in range(400):
        decoder.step(x[:, t])
        sizes.add(decoder._buffer.shape[3])
    assert max(sizes) <= 2 * WINDOW + 4 + 64


def test_blocks_have_decoders_of_their_own_where_nothing_else_is_expected():
    """A subclass, a hook on a block or inside it, or another module inside: each is called, and its effect is there."""
    assert isinstance(attention().decoder(), AttentionDecoder)
    assert isinstance(RecurrentBlock(32, "gru").decoder(), RecurrentDecoder)

    class Doubled(TransformerBlock):
        def forward(self, x, state=None):
            y, state = super().forward(x, state)
            return 2 * y, state

    class Louder(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    x = inputs(2, 20)
    doubled = randomised(Doubled(32, 4, window=WINDOW))
    hooked = randomised(attention())
    hooked.register_forward_hook(lambda block, given, output: (output[0] + 1, output[1]))
    inside = randomised(attention())
    inside.mlp_in.register_forward_hook(lambda module, given, output: output - 1)
    exchanged, recurrent = attention(), RecurrentBlock(32, "mingru")
    exchanged.qkv, recurrent.cell_out = Louder(32, 96, bias=False), Louder(32, 32, bias=False)
    for block in (doubled, hooked, inside, randomised(exchanged), randomised(recurrent)):
        close(read_all(block.decoder(), x, [6, 1]), block(x)[0])
    assert isinstance(doubled.decoder(), CellDecoder) and isinstance(hooked.decoder(), CellDecoder)
    assert inside.decoder()._prepared is None and exchanged.decoder()._prepared is None


@pytest.mark.parametrize("change", ["step", "data", "storage"])
def test_prepared_weights_are_kept_for_the_next_text_and_follow_the_model(change):
    block, x = randomised(attention()), inputs(1, 10)
    first = block.decoder()
    assert (first._prepared is not None) == torch.backends.mkl.is_available()
    assert block.decoder()._prepared is first._prepared
    before = read_all(first, x, [1])
    for p in block.parameters():
        if change == "step":  # as an optimizer does
            p.mul_(1.5)
        elif change == "data":  # which torch does not count
            p.data.mul_(1.5)
        else:
            p.data = p.data * 1.5
    close(read_all(block.decoder(), x, [1]), block(x)[0])
    assert not torch.allclose(read_all(block.decoder(), x, [1]), before)


def test_what_was_prepared_goes_with_the_model():
    block = randomised(attention())
    block.decoder()
    kept = len(prepared._kept)
    del block
    gc.collect()
    assert len(prepared._kept) < kept


def test_a_matrix_gives_what_linear_gives():
    """In panels and transposed, scaled or not, with a bias or not; also where the outputs fill no panel."""
    for n_out in (2 * PANEL, PANEL + 3):
        weight, scale, bias = torch.randn(n_out, 7), torch.rand(7), torch.randn(n_out)
        for rows in (1, 2, FEW_ROWS, FEW_ROWS + 1, 40):
            x, residual = torch.randn(rows, 7), torch.randn(rows, n_out)
            kept = residual.clone()
            close(Matrix(weight)(x), x @ weight.T)
            close(Matrix(weight, scale)(x), x * scale @ weight.T)
            close(Matrix(weight, scale, bias)(x), x * scale @ weight.T + bias)
            close(Matrix(weight).add_to(residual, x), residual + x @ weight.T)
            assert torch.equal(residual, kept)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e6])
def test_a_norm_gives_what_the_module_gives(kind, size):
    module, x = make_norm(kind, 24), size * torch.randn(5, 24)
    for p in module.parameters():
        p.copy_(torch.rand(p.shape))
    norm = Norm(module)
    close(norm(x) if norm.scale is None else norm(x) * norm.scale, module(x))


def test_nothing_is_prepared_under_autocast_or_without_fast_batched_products(monkeypatch):
    block = attention()
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_prepare(block, [TransformerBlock])
    monkeypatch.setattr(prepared.torch.backends.mkl, "is_available", lambda: False)
    assert not can_prepare(block, [TransformerBlock])
    x = inputs(2, 30)
    close(read_all(randomised(block).decoder(), x, [5, 1]), block(x)[0])


def test_rows_of_nested_states():
    a = torch.arange(6).view(3, 2)
    rows = torch.tensor([2, 0])
    chosen = select_rows({"a": (a, None), "b": [a[:, 0], 5]}, rows)
    assert torch.equal(chosen["a"][0], a[rows]) and chosen["a"][1] is None
    assert torch.equal(chosen["b"][0], a[rows, 0]) and chosen["b"][1] == 5
