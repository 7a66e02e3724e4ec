"""Reads a batch along one path, or each row along its own, and gives the logits of what follows; can take tokens back.

A block has a memory of its own for every path prefix that leads to it: on the path (4, 6) block 6 reads what block 4 made, on
the path (2, 4, 6) something else (arXiv 2606.21497; docs/method.md 1.4). Paths that begin alike share the blocks they begin
with. Rows of different paths go through a block together, in one call, where they need it.

Shapes: B rows of a batch, T and K tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hbll_seq.generation.protocol import CausalLM
from hbll_seq.layers.base import ROLLBACK, Decoder, select_rows
from hbll_seq.utils.reading import quote

Path = tuple[int, ...]


class Runner:
    """A model that reads a batch of sequences, with buffers that are written in place and weights prepared once.

    Buffers belong to this object, and it goes on with the weights that the model has now: a model that was trained on since
    needs a new runner. Use it without gradients (``torch.no_grad()``) and with the model in evaluation mode.

    Args:
        model: see :class:`hbll_seq.generation.protocol.CausalLM`.
        paths: the path of all rows, or a list of paths, one for each row.
        start: [B], the number of left-padding positions of each row, or None for none.
        also: more paths that all rows are read along, such as that of a draft, or beginnings of the rows' path;
            :meth:`read`, :meth:`step` and :meth:`states` name them.
        rollback: how many of the last tokens :meth:`truncate` can take back.

    Raises:
        ValueError: a path is not dyadic, or ``also`` is given where rows have different paths.
    """

    def __init__(
        self,
        model: CausalLM,
        paths: Sequence[int] | Sequence[Sequence[int]],
        start: Tensor | None = None,
        *,
        also: Iterable[Sequence[int]] = (),
        rollback: int = ROLLBACK,
    ):
        self.model = model
        is_list = isinstance(paths, (list, tuple)) and paths and isinstance(paths[0], (list, tuple))
        rows = [model.resolve_path(path=path) for path in (paths if is_list else [paths])]
        also = [tuple(path) if rows[0][: len(path)] == tuple(path) else model.resolve_path(path=path) for path in also]
        #: the path of all rows; None where they have different ones
        self.path: Path | None = rows[0] if len(set(rows)) == 1 else None
        if self.path is not None:
            self._walk = SharedPaths(model, self.path, [self.path, *also], start, rollback)
        elif also:
            raise ValueError(f"also={quote(also)} with rows of different paths: give all rows one path, or leave it out")
        else:
            self._walk = _PathsOfRows(model, rows, start, rollback)

    @property
    def length(self) -> int:
        """Positions read along the rows' own paths, left padding included."""
        return self._walk.position(self.path)

    def position(self, path: Sequence[int] | None = None) -> int:
        """Positions read along ``path``, one of those this runner was made for; by default the rows' own."""
        return self._walk.position(self._known(path))

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Read the prompts [B, T] along all paths -> logits [B, V] of the token that follows, along the rows' own."""
        for path in self._walk.others:
            self._walk.states(self.model.embed(input_ids), path)
        return self.logits(self._walk.states(self.model.embed(input_ids), self.path)[:, -1])

    def step(self, tokens: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """One more token for each row, [B] -> logits [B, V] of the next; ``path`` as in :meth:`read`."""
        path = self._known(path)
        x = self.model.embed(tokens.unsqueeze(1))[:, 0]
        return self.logits(self._walk.step(x, path), path)

    def read(self, tokens: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """The next tokens at once, [B, K] -> logits [B, K, V] of what follows each.

        Args:
            tokens: those at the positions from ``position(path)`` on. A block that another path took further already
                answers from memory, so that these tokens must be the ones it has read there.
            path: by default the rows' own; or another that this runner was made for.
        """
        return self.logits(self.states(tokens, path), path)

    def states(self, tokens: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """What :meth:`read` reads the logits from: states [B, K, C] after the blocks of the path."""
        return self._walk.states(self.model.embed(tokens), self._known(path))

    def logits(self, states: Tensor, path: Sequence[int] | None = None) -> Tensor:
        """States [B, ..., C] after the blocks of the path -> logits [B, ..., V]."""
        return self._walk.read_out(states, self._known(path))

    def decoder(self, prefix: Sequence[int]) -> Decoder:
        """The decoder of the last block of ``prefix``, the beginning of a path of all rows.

        Who steps it by hand, as with a guess of its input, must truncate it before this runner reads on.
        """
        return self._walk.decoder(tuple(prefix))

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on, along all paths.

        Raises:
            ValueError: more than ``rollback`` positions of a path would go, or there are fewer.
        """
        if not isinstance(length, int) or not 0 <= length <= max(map(self._walk.position, self._walk.paths)):
            raise ValueError(f"length={quote(length)}: must be a number of positions that were read, 0 to {self.length}")
        self._walk.truncate(length)

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        """Go on with these rows alone: some of them, in any order, a row several times (several samples of a prompt)."""
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        self._walk.keep(rows, self.model.embed.weight.device)

    def _known(self, path: Sequence[int] | None) -> Path | None:
        if path is None:
            return self.path
        path = tuple(path)
        if path not in self._walk.paths:
            raise ValueError(f"path={quote(list(path))}: this runner was made for {quote(self._walk.paths)}; name it there")
        return path


def _read_out(model: CausalLM) -> Callable[[Tensor, Path], Tensor]:
    """The model's ``read_out``, prepared where it can be."""
    prepare = getattr(model, "prepare_read_out", None)
    return model.read_out if prepare is None else prepare()


def _advance(decoder: Decoder, x: Tensor) -> Tensor:
    """[B, T, C] -> [B, T, C] by ``step`` where that will do."""
    return decoder.step(x[:, 0]).unsqueeze(1) if x.shape[1] == 1 else decoder.read(x)


class _Stage:
    """The last block of a path prefix: its decoder, and late outputs where another path may still ask for them."""

    def __init__(self, decoder: Decoder, keeps_outputs: bool):
        self.decoder, self._keeps = decoder, keeps_outputs
        self._outputs: list[tuple[int, Tensor]] = []  # first position and [B, T, C], without gaps

    def read(self, x: Tensor, first: int, last: int) -> Tensor:
        """Inputs [B, T, C] from where this block stands on -> outputs at ``first`` .. ``last - 1``, from memory or new."""
        at = self.decoder.length
        late = [(low, y) for low, y in self._outputs if first < low + y.shape[1] and low < last]
        parts = [y[:, max(0, first - low) : last - low] for low, y in late]
        if x.shape[1]:
            y = _advance(self.decoder, x)
            if self._keeps:
                self._outputs.append((at, y))
            parts.append(y)
        if not parts:  # the next block is as far as this one
            return x
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def forget(self, needed: int) -> None:
        """Drop the outputs before the position ``needed``; not at every call, which would cost more than it frees."""
        if len(self._outputs) > 2 * self.decoder.rollback:
            self._outputs = [(at, y) for at, y in self._outputs if at + y.shape[1] > needed]

    def truncate(self, length: int) -> None:
        if self.decoder.length > length:
            self.decoder.truncate(length)
        self._outputs = [(at, y[:, : length - at]) for at, y in self._outputs if at < length]

    def keep(self, rows: Tensor) -> None:
        self.decoder.keep(rows)
        self._outputs = select_rows(self._outputs, rows)


class SharedPaths:
    """All rows along one path, or along several that share the stages of the prefixes they have in common."""

    def __init__(self, model: CausalLM, path: Path, paths: list[Path], start: Tensor | None, rollback: int):
        self.paths, self.read_out = list(dict.fromkeys(paths)), _read_out(model)
        self.others = [other for other in self.paths if other != path]
        self._children: dict[Path, set[Path]] = {}
        for p in self.paths:
            for k in range(len(p)):
                self._children.setdefault(p[:k], set()).add(p[: k + 1])
        self._stages: dict[Path, _Stage] = {}
        for prefix in sorted({p[:k] for p in self.paths for k in range(1, len(p) + 1)}):
            n, n_readers = prefix[-1], len(self._children.get(prefix, ())) + (prefix in self.paths)
            decoder = model.blocks[n - 1].decoder(start, rollback=rollback)
            self._stages[prefix] = _Stage(decoder, n_readers > 1)
        self._along = {p: [self._stages[p[:k]] for k in range(1, len(p) + 1)] for p in self.paths}
        #: the whole of it where there is one path
        self._chain = [stage.decoder for stage in self._along[path]] if not self.others else None

    def position(self, path: Path) -> int:
        """Positions read along a path."""
        return self._along[path][-1].decoder.length

    def decoder(self, prefix: Path) -> Decoder:
        """That of the last block of a prefix. Raises ValueError where no path begins so."""
        if prefix not in self._stages:
            raise ValueError(f"prefix={quote(list(prefix))}: no path of this runner begins so: {quote(self.paths)}")
        return self._stages[prefix].decoder

    def step(self, x: Tensor, path: Path) -> Tensor:
        """[B, C] -> [B, C]."""
        if self._chain is None:
            return self.states(x.unsqueeze(1), path)[:, 0]
        for decoder in self._chain:
            x = decoder.step(x)
        return x

    def states(self, x: Tensor, path: Path) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        stages = self._along[path]
        at = stages[-1].decoder.length
        last = at + x.shape[1]
        wanted = [stage.decoder.length for stage in stages[1:]] + [at]  # from where on the next reader asks for outputs
        x = x[:, stages[0].decoder.length - at :]
        for stage, first in zip(stages, wanted):
            x = stage.read(x, first, last)
        if self._chain is None:
            for prefix, stage in self._stages.items():
                standing = [self._stages[child].decoder.length for child in self._children.get(prefix, ())]
                stage.forget(min([*standing, stage.decoder.length - stage.decoder.rollback]))
        return x

    def truncate(self, length: int) -> None:
        """See :meth:`Runner.truncate`."""
        for stage in self._stages.values():
            stage.truncate(length)

    def keep(self, rows: list[int], device: torch.device) -> None:
        """See :meth:`Runner.keep`."""
        index = torch.tensor(rows, device=device)
        for stage in self._stages.values():
            stage.keep(index)


class _PathsOfRows:
    """Each row along its own path. A block is called once, with all rows whose path holds it: paths visit blocks in order."""

    others: Sequence[Path] = ()

    def __init__(self, model: CausalLM, paths: list[Path], start: Tensor | None, rollback: int):
        self.paths, self._read_out = [None], _read_out(model)
        device = model.embed.weight.device
        self._sort(paths, device)
        self._decoders: dict[int, Decoder] = {}
        for n, members in self._members.items():
            rows = torch.tensor([self._order[i] for i in members], device=device)
            self._decoders[n] = model.blocks[n - 1].decoder(None if start is None else start[rows], rollback=rollback)

    def _sort(self, paths: list[Path], device: torch.device) -> None:
        """Rows in the order of their paths, so that the rows of a block mostly stand side by side."""
        self._row_paths, self._order = paths, sorted(range(len(paths)), key=lambda row: paths[row])
        inside = torch.tensor(self._order, device=device)
        self._inside, self._outside = inside, inside.argsort()
        ordered = [paths[row] for row in self._order]
        first = {path: ordered.index(path) for path in dict.fromkeys(ordered)}
        self._groups = [(path, low, low + ordered.count(path)) for path, low in first.items()]
        self._members = {n: [i for i, path in enumerate(ordered) if n in path] for n in sorted({n for p in paths for n in p})}
        self._index = {n: torch.tensor(members, device=device) for n, members in self._members.items()}

    def position(self, path: None) -> int:
        return next(iter(self._decoders.values())).length

    def decoder(self, prefix: Path) -> Decoder:
        raise ValueError(f"prefix={quote(list(prefix))}: the rows here have different paths; make a runner for each path")

    def step(self, x: Tensor, path: None) -> Tensor:
        return self._through(x, lambda decoder, part: decoder.step(part))

    def states(self, x: Tensor, path: None) -> Tensor:
        return self._through(x, _advance)

    def _through(self, x: Tensor, call) -> Tensor:
        """Rows [B, ...] through their blocks. A decoder may hold on to what it read, so that nothing is written in place."""
        x = x[self._inside]
        for n, decoder in self._decoders.items():
            members = self._members[n]
            low, high = members[0], members[-1] + 1
            if len(members) == len(x):
                x = call(decoder, x)
            elif high - low == len(members):
                x = torch.cat((x[:low], call(decoder, x[low:high]), x[high:]))
            else:
                x = x.index_copy(0, self._index[n], call(decoder, x[self._index[n]]))
        return x[self._outside]

    def read_out(self, states: Tensor, path: None) -> Tensor:
        states = states[self._inside]
        return torch.cat([self._read_out(states[low:high], p) for p, low, high in self._groups])[self._outside]

    def truncate(self, length: int) -> None:
        for decoder in self._decoders.values():
            decoder.truncate(length)

    def keep(self, rows: list[int], device: torch.device) -> None:
        before = {n: [self._order[i] for i in members] for n, members in self._members.items()}
        self._sort([self._row_paths[row] for row in rows], device)
        for n in list(self._decoders):
            if n not in self._members:
                del self._decoders[n]
                continue
            kept = [before[n].index(rows[self._order[i]]) for i in self._members[n]]
            self._decoders[n].keep(torch.tensor(kept, device=device))
