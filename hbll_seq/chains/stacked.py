"""Equal Transformer blocks at several states at once: batched products and one call of attention in place of a loop.

The passes of sweeps (docs/method.md 2.2) evaluate R blocks of one shape at R states. One after the other, that is R times
the calls of a block; a small block spends most of its time on calls. Here the matrices of all blocks lie in one tensor, so
that a pass makes the calls of one block. The blocks keep their parameters and names: what lies here are copies, made anew
when a parameter has changed, which is once a step. :func:`pays` says where that is faster.

Shapes: R rows, B batch, T tokens, N = B T, C width, H heads, K heads of keys and values, D width of a head, I inputs and O
outputs of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbll_seq.layers.attention import TransformerBlock
from hbll_seq.layers.attention_arithmetic import attention, rotation
from hbll_seq.layers.prepared import is_plain

_MATRICES = ("qkv", "attention_out", "mlp_in", "mlp_out")


#: numbers of a row, B T C, up to which a step was measured to be 8% faster or more, in two runs; above, it was between 14%
#: faster and 9% slower. And the longest sequence and the widest block that were measured: attention costs T^2, and a step
#: copies 12 C^2 numbers of a block.
_MANY, _LONGEST, _WIDEST = 16384, 128, 256


def pays(n_rows: int, batch: int, tokens: int, width: int, device: torch.device | str) -> bool:
    """Whether :class:`StackedBlocks` are expected to make a training step faster by 5% or more.

    It follows from ``train/results/bench_stacked.json``: in float32, on one CPU thread, with four heads. What was not
    measured is not expected to be faster; that includes every GPU.

    Args:
        n_rows: R, blocks of a pass.
        batch, tokens, width: B, T and C.
        device: where they are.
    """
    if torch.device(device).type != "cpu" or n_rows < 2:
        return False
    return tokens <= _LONGEST and width <= _WIDEST and batch * tokens * width <= _MANY


class StackedBlocks:
    """Equal plain TransformerBlocks, evaluated side by side; made by :meth:`of`.

    What was checked then is not checked again: make a new one where a hook, another part or the training mode of a block
    with dropout may have come since. It holds the blocks' parameters, and copies of them that it makes anew when their
    counters of changes say so. A change that torch does not count, as those through ``p.data``, needs :meth:`refresh`.
    """

    def __init__(self, blocks: Sequence[TransformerBlock]):
        first = self._first = blocks[0]
        self.n_blocks, self.width = len(blocks), first.norm_attention.normalized_shape[-1]
        of_each = [dict(block.named_parameters()) for block in blocks]
        self._parameters = {name: [each[name] for each in of_each] for name in of_each[0]}
        self._by_row = [list(each.values()) for each in of_each]
        self._copies: dict[str, Tensor] = {}
        self._known: list[tuple] = []

    @classmethod
    def of(cls, blocks: Sequence[nn.Module]) -> StackedBlocks | None:
        """These blocks stacked; None where that would not do what the blocks do.

        They must be TransformerBlocks of one shape with the same options, on one device; no subclass, no hook, nothing
        compiled, no part replaced by one of another kind, no parameter shared, no dropout in training.
        """
        if not blocks or not all(map(_can_stack, blocks)) or len({_form(block) for block in blocks}) > 1:
            return None
        parameters = [p for block in blocks for _, p in block.named_parameters(remove_duplicate=False)]
        return cls(blocks) if len(set(map(id, parameters))) == len(parameters) else None

    def refresh(self) -> None:
        """The next call copies the parameters anew, whatever their counters of changes say."""
        self._known = []

    def __call__(self, rows: Sequence[int], states: Tensor) -> Tensor:
        """What the blocks make of their states.

        Derivatives are those of the blocks themselves: by the states, and by each block's own parameters. They can be
        taken once: a graph of derivatives (``create_graph``) is refused. A product of some rows' outputs costs that of all
        rows of the call.

        Args:
            rows: numbers of blocks as they were given to :meth:`of`, from 0; in any order, a block several times.
            states: [R, B, T, C].

        Returns:
            [R, B, T, C].

        Raises:
            ValueError: another shape or precision, or a row that is not there.
            RuntimeError: when a graph of derivatives is asked for.
        """
        self._check(rows, states)
        weights = _Rows(self, rows, states)
        n_rows, batch, tokens, width = states.shape
        x = states.reshape(n_rows, batch * tokens, width)
        heads = weights.product("qkv", weights.norm("norm_attention", x))
        x = weights.product("attention_out", self._attend(weights, heads, batch, tokens), add_to=x)
        hidden = weights.product("mlp_in", weights.norm("norm_mlp", x))
        x = weights.product("mlp_out", self._first._activate(hidden), add_to=x)
        if x.requires_grad:
            x.register_hook(_refuse_second_derivatives)
        return x.view(states.shape)

    def _check(self, rows: Sequence[int], states: Tensor) -> None:
        if states.dim() != 4 or len(states) != len(rows) or states.shape[-1] != self.width or not len(rows):
            raise ValueError(f"states of shape {tuple(states.shape)} for {len(rows)} rows: must be [{len(rows)}, batch, "
                             f"tokens, {self.width}], with one row or more")
        if min(rows) < 0 or max(rows) >= self.n_blocks:
            raise ValueError(f"rows={list(rows)}: there are {self.n_blocks} blocks, name rows from 0 to {self.n_blocks - 1}")

    def _attend(self, weights: _Rows, heads: Tensor, batch: int, tokens: int) -> Tensor:
        """Queries, keys and values [R, N, (H + 2 K) D] -> what is read, [R, N, C]."""
        block = self._first
        n_rows, n_turned = len(heads), block.n_head + block.n_kv_head
        heads = heads.view(n_rows, batch * tokens, n_turned + block.n_kv_head, -1)
        turned, v = heads.split((n_turned, block.n_kv_head), dim=2)
        if block.qk_norm:
            turned = weights.norm_heads(turned, block.n_head, block.n_kv_head)
        table = _turns(tokens, heads.shape[-1], block.rope_base, heads.device)
        turned = _rotate(turned.reshape(n_rows * batch, tokens, n_turned, -1), *table)
        q, k = turned.transpose(1, 2).split((block.n_head, block.n_kv_head), dim=1)
        v = v.reshape(n_rows * batch, tokens, block.n_kv_head, -1).transpose(1, 2)
        mask = _band(tokens, block.window, heads.device) if tokens > block.window else None
        read = attention(q, k, v, mask, is_causal=mask is None and tokens > 1)
        return read.transpose(1, 2).reshape(n_rows, batch * tokens, -1)

    def _stacked(self, rows: Sequence[int], dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies [n_blocks, ...] of all parameters, matrices in ``dtype``; made anew if a parameter of ``rows`` changed."""
        known, by_row = self._known, self._by_row
        now = {r: (dtype, [(p.data_ptr(), p._version) for p in by_row[r]]) for r in rows}
        if not known or any(known[r] != state for r, state in now.items()):
            # New tensors, not the old ones written over: a graph may still need those.
            with torch.inference_mode(False), torch.no_grad():
                self._copies = {
                    name: torch.stack([p.to(dtype) if p.dim() == 2 else p for p in of_all])
                    for name, of_all in self._parameters.items()
                }
            self._known = [(dtype, [(p.data_ptr(), p._version) for p in row]) for row in by_row]
        return self._copies


class _Rows:
    """The weights of some rows for one call.

    Args:
        stack: the blocks.
        rows: which of them.
        states: [R, B, T, C], what they will read.
    """

    def __init__(self, stack: StackedBlocks, rows: Sequence[int], states: Tensor):
        self._stack, self._rows = stack, rows
        weight = stack._parameters["qkv.weight"][0]
        self._dtype = weight.dtype
        device = weight.device.type
        if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):  # which leaves float64 alone
            self._dtype = torch.get_autocast_dtype(device)
        elif states.dtype != weight.dtype:
            raise ValueError(f"states of {states.dtype}: the blocks are of {weight.dtype}; convert one, or use autocast")
        self._copies = stack._stacked(rows, self._dtype)
        self._graph = torch.is_grad_enabled()

    def norm(self, name: str, x: Tensor) -> Tensor:
        """The normalisation of this name of ``x`` [R, N, C]."""
        layer = getattr(self._stack._first, name)
        scale = self._vectors(f"{name}.weight").unsqueeze(1)
        x = x.to(scale.dtype)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, x.shape[-1:], eps=layer.eps) * scale
        return torch.addcmul(self._vectors(f"{name}.bias").unsqueeze(1), F.layer_norm(x, x.shape[-1:], eps=layer.eps), scale)

    def norm_heads(self, heads: Tensor, n_queries: int, n_keys: int) -> Tensor:
        """Queries and keys [R, N, H + K, D], normalised over D."""
        scales = [self._vectors(f"norm_{part}.weight").unsqueeze(1).expand(-1, n, -1)
                  for part, n in (("q", n_queries), ("k", n_keys))]  # fmt: skip
        scale = torch.cat(scales, 1).unsqueeze(1)
        return F.rms_norm(heads.to(scale.dtype), heads.shape[-1:], eps=self._stack._first.norm_q.eps) * scale

    def product(self, name: str, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """``x`` [R, N, I] times the transposed matrices [R, O, I] of this name, plus ``add_to``: [R, N, O]."""
        name = f"{name}.weight"
        x, matrices = x.to(self._dtype), _select(self._copies[name], self._rows).transpose(1, 2)
        own = self._own(name)
        if own is None:
            if add_to is not None and add_to.dtype == x.dtype:
                return torch.baddbmm(add_to, x, matrices)
            y = torch.bmm(x, matrices)
        else:
            y = torch.baddbmm(_Parameters.apply(x.detach(), *own), x, matrices)
        return y if add_to is None else y + add_to

    def _vectors(self, name: str) -> Tensor:
        """The parameters of this name, [R, C]."""
        own = self._own(name)
        return _select(self._copies[name], self._rows) if own is None else torch.stack(own)

    def _own(self, name: str) -> list[nn.Parameter] | None:
        """The blocks' own parameters of this name if a graph is made that leads to them."""
        own = [self._stack._parameters[name][r] for r in self._rows] if self._graph else []
        return own if any(p.requires_grad for p in own) else None


class _Parameters(torch.autograd.Function):
    """Zeros [R, N, O] that are added to a product with copies of matrices, and lead its gradient to the matrices themselves.

    The gradient by the inputs goes past them. So a product by the inputs alone does not compute the matrices' gradients,
    as it would if one function had both: a Function is not told which of its gradients are wanted. And the gradients lie in
    memory like the parameters, which takes them without a copy.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dtype = matrices[0].dtype
        return x.new_zeros(()).expand(*x.shape[:2], len(matrices[0]))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, *torch.bmm(gradient.transpose(1, 2), x).to(ctx.dtype).unbind(0)


def _refuse_second_derivatives(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("stacked blocks have first derivatives only: take a graph of derivatives (create_graph=True) "
                           "through the blocks themselves")


def _select(stack: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a stack; without a copy where they are evenly spaced upwards, as in passes over a chain and its chunks."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and all(b - a == step for a, b in zip(rows, rows[1:])):
        return stack[rows[0] : rows[-1] + 1 : step]
    return torch.stack([stack[r] for r in rows])


@lru_cache(maxsize=16)
def _turns(tokens: int, head_width: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign of :func:`_rotate`, both [T, 1, D], of the positions 0 .. T - 1."""
    with torch.inference_mode(False):
        cos, sin = rotation(torch.arange(tokens, device=device), head_width, base)
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`attention_arithmetic.rotate` of ``x`` [.., T, H, D] in three calls in place of seven."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


@lru_cache(maxsize=16)
def _band(tokens: int, window: int, device: torch.device) -> Tensor:
    """[T, T]: True where a query sees a key."""
    with torch.inference_mode(False):
        positions = torch.arange(tokens, device=device)
        distance = positions[:, None] - positions
        return (distance >= 0) & (distance < window)


# --------------------------------------------------------------------------------------------- what can be stacked


def _can_stack(block: nn.Module) -> bool:
    """Whether the block does what its class says and no more."""
    if type(block) is not TransformerBlock or not is_plain(block, [TransformerBlock]):
        return False
    if _hooks_on_all() or not all(map(_is_untouched, block.modules())):
        return False
    if any(m.p > 0 and m.training for m in block.modules() if isinstance(m, nn.Dropout)):
        return False
    return _has_usual_parts(block)


def _is_untouched(module: nn.Module) -> bool:
    """Whether nobody has put a hook on the module, compiled it in place, or given it a method of its own."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and module._compiled_call_impl is None and _methods(type(module)).isdisjoint(vars(module))


@lru_cache(maxsize=16)
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def _hooks_on_all() -> bool:
    """Whether hooks are there that torch calls for every module."""
    return any(getattr(nn.modules.module, f"_global_{kind}_hooks")
               for kind in ("forward", "forward_pre", "backward", "backward_pre"))  # fmt: skip


def _norms(block: TransformerBlock) -> list[str]:
    return ["norm_attention", *(["norm_q", "norm_k"] if block.qk_norm else []), "norm_mlp"]


def _has_usual_parts(block: TransformerBlock) -> bool:
    """Whether the parts are of the kinds that a block makes, with the parameters that it gives them."""
    parts = dict(block.named_children())
    norms = [name for name in _norms(block) if type(parts.get(name)) in (nn.RMSNorm, nn.LayerNorm)]
    if len(norms) < len(_norms(block)) or any(type(parts.get(name)) is not nn.Linear for name in _MATRICES):
        return False
    if block.qk_norm and (type(block.norm_q) is not nn.RMSNorm or _options_of(block.norm_q) != _options_of(block.norm_k)):
        return False
    names = {f"{name}.weight" for name in (*norms, *_MATRICES)}
    names |= {f"{name}.bias" for name in norms if type(parts[name]) is nn.LayerNorm}
    parameters = dict(block.named_parameters(remove_duplicate=False))
    kinds = {(type(p) in (nn.Parameter, Tensor), p.is_inference(), p.dtype, p.device) for p in parameters.values()}
    return set(parameters) == names and len(kinds) == 1 and next(iter(kinds))[:2] == (True, False)


def _options_of(norm: nn.Module) -> tuple:
    return type(norm), tuple(norm.normalized_shape), norm.eps


def _form(block: TransformerBlock) -> tuple:
    """What must be equal for two blocks to be stacked."""
    options = (block.n_head, block.n_kv_head, block.window, block.rope_base, block.qk_norm, block.mlp)
    parameters = tuple((name, p.shape, p.dtype, p.device) for name, p in block.named_parameters())
    return options, parameters, tuple(_options_of(getattr(block, name)) for name in _norms(block))
