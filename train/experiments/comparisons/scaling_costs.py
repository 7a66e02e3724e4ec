"""What the parts of a training step cost on this machine: times on one thread, bytes, and collectives of small groups.

Work is timed by processor time, which other jobs of the machine stretch less than the clock; collectives by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, distributed

from bench_depth import LiveStorages
from comparisons.group import leave, run_group
from comparisons.parallel_methods import Shape
from hbll_seq.distributed.gradients import clip_gradients, squared_norm

SIZES = (2**10, 2**16, 2**20, 2**22)  # bytes of a collective that is timed
_BLOCKS = 7  # walked one after the other, so that each finds the caches as in a model


@dataclass(frozen=True)
class Work:
    """Seconds of a block and of what is around all blocks, for one number of rows.

    iterate: forward without gradient. forward: with what the backward needs. product: backward for the input alone.
    backward: for input and parameters. embed, head: forward and backward; of the head with the loss.
    """

    iterate: float
    forward: float
    product: float
    backward: float
    embed: float
    head: float


@dataclass(frozen=True)
class Wires:
    """A collective of R ranks takes ``latency`` (R - 1) + ``per_byte`` times the bytes that a rank sends; a message
    ``message`` + ``per_byte`` times its bytes. Seconds."""

    latency: float
    per_byte: float
    message: float

    def collective(self, n_ranks: int, sent: float) -> float:
        """Of so many bytes sent by each rank; none of one rank."""
        return 0.0 if n_ranks == 1 else self.latency * (n_ranks - 1) + self.per_byte * sent

    def reduction(self, n_ranks: int, n_bytes: float) -> float:
        """An all-reduce of so many bytes, round a ring."""
        return self.collective(n_ranks, 2 * (n_ranks - 1) / n_ranks * n_bytes)

    def gather(self, n_ranks: int, n_bytes: float) -> float:
        """An all-gather of so many bytes of each rank."""
        return self.collective(n_ranks, (n_ranks - 1) * n_bytes)

    def send(self, n_bytes: float) -> float:
        """A message to one other rank."""
        return self.message + self.per_byte * n_bytes


@dataclass(frozen=True)
class Costs:
    """What a step is put together from.

    work: by rows of a micro-batch.
    update: seconds per parameter of clipping and AdamW.
    block_parameters, shared_parameters: numbers, of a block, and of embedding and head.
    saved_bytes: what a block keeps for its backward, at all rows. head_bytes: the peak of the head. state_bytes: of a state.
    """

    work: dict[int, Work]
    update: float
    block_parameters: int
    shared_parameters: int
    saved_bytes: float
    head_bytes: float
    state_bytes: float
    wires: Wires

    def as_json(self) -> dict:
        """For :meth:`of_json`."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: dict) -> Costs:
        """What :meth:`as_json` has written."""
        work = {int(rows): Work(**times) for rows, times in data["work"].items()}
        return cls(**{**data, "work": work, "wires": Wires(**data["wires"])})


def measure_costs(shape: Shape, repeats: int, patience: float, groups: Sequence[int] = (2, 4)) -> Costs:
    """All of them, for models of that width, batch, context and vocabulary, whatever their number of blocks.

    Raises:
        ValueError: the processes of a group could not be timed.
    """
    small = Shape(**{**asdict(shape), "blocks": _BLOCKS})
    model = small.model()
    rows = [n for n in range(1, shape.batch_size + 1) if shape.batch_size % n == 0]
    work = {n: _work(model, small.batch(0)[:n], repeats) for n in rows}
    tokens = small.batch(0)
    state = model.embed(tokens[:, :-1]).detach()
    with LiveStorages([*model.parameters(), state]) as live:
        kept = _chain(model, state.requires_grad_())
        saved = live.current / _BLOCKS
    with LiveStorages([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), kept]) as live:
        _score(model, kept.detach().requires_grad_(), tokens).backward()
        head = live.peak
    n_block = sum(p.numel() for p in model.blocks.parameters()) // _BLOCKS
    n_shared = sum(p.numel() for p in model.parameters()) - _BLOCKS * n_block
    wires = fitted(measure_collectives(repeats, patience, groups))
    state_bytes = state.numel() * state.element_size()
    return Costs(work, _update(model, repeats), n_block, n_shared, saved, head, state_bytes, wires)


def _work(model: torch.nn.Module, tokens: Tensor, repeats: int) -> Work:
    state, embed = model.embed(tokens[:, :-1]).detach(), list(model.embed.parameters())
    parameters, into = list(model.blocks.parameters()), torch.ones_like(state)

    def walked() -> tuple[Tensor, Tensor]:
        begun = state.clone().requires_grad_()
        return begun, _chain(model, begun)

    def scored() -> None:
        loss = _score(model, state.clone().requires_grad_(), tokens)
        loss.backward()

    forward = _seconds(walked, repeats)
    with torch.no_grad():
        iterate = _seconds(lambda: _chain(model, state), repeats)
    product = _seconds_of_second(walked, lambda got: torch.autograd.grad(got[1], got[0], into), repeats)
    backward = _seconds_of_second(walked, lambda got: torch.autograd.grad(got[1], [got[0], *parameters], into), repeats)
    embedded = _seconds(lambda: torch.autograd.grad(model.embed(tokens[:, :-1]), embed, into), repeats)
    per_block = [seconds / _BLOCKS for seconds in (iterate, forward, product, backward)]
    return Work(*per_block, embedded, _seconds(scored, repeats))


def _chain(model: torch.nn.Module, state: Tensor) -> Tensor:
    for block in model.blocks:
        state = block(state)[0]
    return state


def _score(model: torch.nn.Module, state: Tensor, tokens: Tensor) -> Tensor:
    return model.score_exits([state], tokens[:, 1:], [model.config.full_path], [1.0])[0]


def _seconds(call: Callable[[], object], repeats: int) -> float:
    return _seconds_of_second(lambda: None, lambda _: call(), repeats)


def _seconds_of_second(first: Callable[[], object], second: Callable, repeats: int) -> float:
    """Median processor seconds of ``second(first())``, of the second alone, after one call that is not timed."""
    times = []
    for _ in range(1 + repeats):
        given = first()
        begun = time.process_time()
        second(given)
        times.append(time.process_time() - begun)
    return median(times[1:])


def _update(model: torch.nn.Module, repeats: int) -> float:
    """Seconds per parameter of what follows the gradients."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3)

    def end() -> None:
        clip_gradients(parameters, float(squared_norm(parameters)) ** 0.5, 1e-2)
        optimizer.step()

    return _seconds(end, repeats) / sum(p.numel() for p in parameters)


# -------------------------------------------------------------------------------------------------------- collectives


def measure_collectives(repeats: int, patience: float, groups: Sequence[int]) -> list[dict]:
    """Rows of ``ranks``, ``what`` (all_reduce, all_gather, message), ``sent`` bytes and ``seconds``."""
    rows = []
    for n_ranks in groups:
        with TemporaryDirectory() as folder:
            found, why = run_group(time_collectives, n_ranks, Path(folder), (repeats,), patience)
        if found is None:
            raise ValueError(f"collectives of {n_ranks} processes cannot be timed: {why}")
        rows += found[0]
    return rows


def time_collectives(rank: int, n_ranks: int, folder: Path, repeats: int) -> None:
    """What a rank of the group does for :func:`measure_collectives`."""
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor

    def there_and_back(tensor: Tensor) -> None:
        if rank == 0:
            distributed.send(tensor, 1)
            distributed.recv(tensor, 1)
        elif rank == 1:
            distributed.recv(tensor, 0)
            distributed.send(tensor, 0)

    rows = []
    for size in SIZES:
        own, all_own = torch.zeros(size // 4), torch.zeros(n_ranks * size // 4)
        calls = {
            "all_reduce": (lambda own=own: distributed.all_reduce(own), 2 * (n_ranks - 1) / n_ranks * size, 1),
            "all_gather": (lambda own=own, into=all_own: gather(into, own), (n_ranks - 1) * size, 1),
            "message": (lambda own=own: there_and_back(own), size, 2),
        }
        for what, (call, sent, times) in calls.items():
            seconds = []
            for _ in range(2 + repeats):
                distributed.barrier()
                begun = time.perf_counter()
                call()
                seconds.append((time.perf_counter() - begun) / times)
            rows.append({"ranks": n_ranks, "what": what, "sent": sent, "seconds": median(seconds[2:])})
    leave(folder, rank, rows)


def fitted(rows: Sequence[dict]) -> Wires:
    """Least relative squares of all collectives, of positive latency and time per byte; messages have their own latency."""
    collectives = [row for row in rows if row["what"] != "message"]
    latency, per_byte = _two_terms([(row["ranks"] - 1, row["sent"], row["seconds"]) for row in collectives])
    messages = [row["seconds"] - per_byte * row["sent"] for row in rows if row["what"] == "message"]
    return Wires(latency, per_byte, max(1e-9, median(messages)))


def _two_terms(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """a, b >= 0 of a x + b y ~ t."""
    left = torch.tensor([[x / t, y / t] for x, y, t in points], dtype=torch.float64)
    a, b = torch.linalg.lstsq(left, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    one = lambda column: max(1e-12, float(column.sum() / column.square().sum()))
    if a <= 0:
        return 1e-9, one(left[:, 1])
    return (a, b) if b > 0 else (one(left[:, 0]), 1e-12)
