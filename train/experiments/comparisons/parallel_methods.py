"""Ways to train a language model on R processes, each a training step with the same data, loss, clipping and AdamW.

    backprop              one process; all others wait
    ddp, fsdp             backprop, each process with batch / R rows, so that the work is the same
    1f1b:m=4, gpipe:m=4   a pipeline of R stages and m micro-batches (torch.distributed.pipelining)
    interleaved:m=4       1F1B with two stages for each process, s and s + R
    zero-bubble:m=4       the same stages; the backward of inputs goes before that of weights
    zbv:m=4               the same with stages s and 2 R - 1 - s
    exact                 ours, a segment for each rank, K = M = S - 1; shares=1+3: of S = 4 segments so many on each
    local                 ours with A = 0, K = S - 1, M = 0: segments learn from exits on their own blocks alone; c=19: of 19
                          blocks; exits=1: a segment without an exit has one in training, with so many blocks of its own
    ahead                 the same, each rank a batch ahead of the next one, on states that are a step old
    ours:K=1,M=1,...      ours with these options of sweeps; segments=S (default R), depths=MIX

Stages have equal numbers of blocks; the first also has the embedding, the last the head. Their matrix is one (tied), as
everywhere here: where the two are on different processes, each has a copy, and the gradients are summed once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from comparisons.parallel_ours import Ours
from comparisons.parallel_pipeline import Pipeline
from comparisons.parallel_training import Backprop, Case, Replica, Training
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective

#: pipelines: class of the schedule in torch, and stages for each process
PIPELINES = {
    "1f1b": ("Schedule1F1B", 1),
    "gpipe": ("ScheduleGPipe", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zero-bubble": ("ScheduleInterleavedZeroBubble", 2),
    "zbv": ("ScheduleZBVZeroBubble", 2),
}
OURS = ("exact", "local", "ahead", "ours")
KINDS = ("backprop", "ddp", "fsdp", *PIPELINES, *OURS)
#: short names of options of sweeps
SHORT = {"K": "forward", "M": "backward", "A": "linearization", "c": "chunk_size"}


@dataclass(frozen=True)
class Shape(Case):
    """What is trained: a model of ``blocks`` blocks, and its batches."""

    blocks: int = 31
    width: int = 128
    heads: int = 4
    batch_size: int = 4
    context_length: int = 128
    vocab: int = 4096
    lr: float = 1e-3
    clip: float = 1.0
    device: str = "cpu"  # or "cuda": each process the one that it has set
    can_recompute: ClassVar[bool] = True  # there is activation checkpointing

    def model(self) -> HBLLForCausalLM:
        """The same weights on every process. No block begins as the identity: it would hide what is sent."""
        torch.manual_seed(0)
        model = HBLLForCausalLM(HBLLConfig(vocab_size=self.vocab, n_level=self.blocks.bit_length(), n_embd=self.width,
                                           n_head=self.heads, context_length=self.context_length))  # fmt: skip
        for p in model.blocks.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)
        return model.to(self.device)

    def processes(self, name: str, ranks: int) -> int:
        return 1 if name == "backprop" else ranks

    def is_exact(self, name: str) -> bool:
        return Method.named(name).is_exact

    def training(self, name: str, n_ranks: int, *, recompute: bool = False, hooked: bool = False) -> Training:
        return Method.named(name).training(self, n_ranks, recompute=recompute, hooked=hooked)

    def baseline(self) -> Training:
        return Backprop(self, BackpropObjective(self.model()))


@dataclass(frozen=True)
class Method:
    """A way to train: ``name`` as it was given, its ``kind``, and its options."""

    name: str
    kind: str
    options: dict[str, str]

    @classmethod
    def named(cls, name: str) -> Method:
        """The method of that name. Raises ValueError for a kind or option that there is not."""
        kind, _, rest = name.partition(":")
        options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        if kind not in KINDS:
            raise ValueError(f"method {name!r}: allowed are {', '.join(KINDS)}; options follow a colon, as in 1f1b:m=4")
        allowed = {"m"} if kind in PIPELINES else {"depths"} if kind in OURS else set()
        allowed |= {"shares"} if kind == "exact" else {"c", "exits"} if kind in ("local", "ahead") else set()
        if kind != "ours" and (unknown := options.keys() - allowed):
            raise ValueError(f"method {name!r}: {kind} has no option {min(unknown)!r}; it has {', '.join(allowed) or 'none'}")
        if kind in PIPELINES and not (options.get("m", "").isdecimal() and int(options["m"]) > 0):
            raise ValueError(f"method {name!r}: say how many micro-batches, as in {kind}:m=4")
        return cls(name, kind, options)

    @property
    def is_exact(self) -> bool:
        """Whether its gradients are backprop's whatever the number of ranks."""
        return self.kind not in ("local", "ahead", "ours")

    @property
    def shares(self) -> tuple[int, ...] | None:
        """Segments of each rank, None for as equal as they go."""
        given = self.options.get("shares")
        if given is not None and not all(part.isdecimal() and int(part) for part in given.split("+")):
            raise ValueError(f"method {self.name!r}: shares are numbers above 0, one for each rank, as in exact:shares=1+3")
        return None if given is None else tuple(map(int, given.split("+")))

    def inference(self, n_blocks: int, n_ranks: int) -> str:
        """Sweeps of one of ours, as text. Raises ValueError where so many blocks are not cut into so many segments."""
        options = {SHORT.get(name, name): value for name, value in self.options.items() if name not in ("depths", "shares")}
        if self.shares is not None and len(self.shares) != n_ranks:
            raise ValueError(f"method {self.name!r}: {len(self.shares)} shares for {n_ranks} ranks; give one for each")
        segments = int(options.pop("segments", sum(self.shares or (n_ranks,))))
        size = -(-n_blocks // segments)
        if -(-n_blocks // size) != segments and "chunk_size" not in options:
            raise ValueError(f"method {self.name!r}: {n_blocks} blocks are {-(-n_blocks // size)} segments of {size}, not "
                             f"{segments}; give another number of segments or blocks")  # fmt: skip
        given = options.get("chunk_size", "")
        if given.isdecimal() and int(given):  # sweeps refuse what is no such number
            segments = -(-n_blocks // int(given))
        most = str(segments - 1)
        alone = {"forward": most, "backward": "0", "linearization": "zero"}
        preset = {"exact": {"forward": most, "backward": most}, "local": alone, "ahead": alone}.get(self.kind, {})
        if "exits" in options:
            preset |= {"auxiliary_exits": "1", "auxiliary_blocks": options.pop("exits")}
        options = {"chunk_size": str(size), **preset, **options}
        return "sweeps:" + ",".join(f"{name}={value}" for name, value in options.items())

    def training(self, shape: Shape, n_ranks: int, *, recompute: bool = False, hooked: bool = False) -> Training:
        """See :meth:`Case.training`."""
        if self.kind == "backprop":
            return Backprop(shape, BackpropObjective(shape.model(), recompute=recompute))
        if self.kind in PIPELINES:
            return Pipeline(shape, *PIPELINES[self.kind], int(self.options["m"]), n_ranks, recompute)
        if self.kind in OURS:
            return Ours(shape, self.inference(shape.blocks, n_ranks), self.options.get("depths"), n_ranks, recompute,
                        ahead=self.kind == "ahead", shares=self.shares)  # fmt: skip
        return Replica(shape, BackpropObjective(shape.model(), recompute=recompute), self.kind, n_ranks, hooked)
