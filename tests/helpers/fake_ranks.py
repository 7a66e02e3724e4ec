"""train/lm.py with an objective whose losses need no other rank, as a script: what stands around an objective is tested.

Every block reads the embedded text alone, with noise of its own replica. The last one's output is scored by the head, the
others follow a target. So each rank has its blocks' losses and a part of the embedding's gradient, and nothing is sent.

Environment: ``FAKE_FLOAT64``: everything in double precision. ``FAULT``: ``process:step:kind`` of what goes wrong, once.
``REAL``: with the objective of the library. ``NO_GATHER``: who puts the ranks' tensors together fails.
"""

import os
import resource
import signal
import sys
import tempfile
import time

import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from hbll_seq.distributed.blocks import blocks_of_rank
from hbll_seq.distributed.ranks import ALONE
from hbll_seq.objectives.base import Objective, ObjectiveOutput
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import checkpoint, language_model, objective, resuming, share
from hbll_seq.utils.seeds import mix_seeds


class FakeObjective(Objective):
    def __init__(self, model, inference, *, time=None, ranks=ALONE, ahead=False, **options):
        super().__init__(model, **options)
        own = blocks_of_rank(len(self.path), inference.chunk_size, ranks.rank, ranks.n_ranks, ranks.shares)
        self.own, self.last = own, len(self.path) - 1

    def forward(self, inputs, labels=None, step=0, states=None):
        fail(step, self.model)
        assert {prefix[-1] for prefix in states or {}} <= {self.path[position] for position in self.own}
        x, targets = self.model.prepare(inputs, labels)
        z0 = self.model.embed(x)
        draw = torch.Generator().manual_seed(mix_seeds(self.noise_seed, step))
        z0 = z0 + 0.1 * torch.randn(z0.shape, generator=draw, dtype=z0.dtype)
        losses, zero = [z0.new_zeros(()) for _ in self.path], z0.new_zeros(())
        metrics, calls = {"ce": zero, "first": zero}, self.calls(step, states)
        for position in self.own:
            path = self.path[: position + 1]
            (out,) = calls.apply((path,), (z0,))
            if position == self.last:
                losses[position], nats = self.model.score_exits([out], targets, [path], [1.0])
                metrics["ce"] = nats[0]
            else:
                losses[position] = (out - z0.detach().roll(1 + position, -1)).square().mean()
            if position == 0:
                metrics["first"] = losses[0].detach()
        losses = torch.stack(losses)
        return ObjectiveOutput(losses.sum(), losses, metrics, dict(calls.last))


class RealObjective(LocalObjective):
    def forward(self, inputs, labels=None, step=0, states=None):
        fail(step, self.model)
        return super().forward(inputs, labels, step, states)


def fail(step, model):
    """What ``FAULT`` asks for."""
    process, when, kind = (os.environ.get("FAULT") or "-1:-1:").split(":")
    joined = distributed.is_initialized()
    if int(when) != step or int(process) != (distributed.get_rank() if joined else 0):
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif kind == "hang":
        time.sleep(8)
    elif kind == "raise":
        raise ValueError("something is wrong on this rank")
    elif kind == "nan":
        spoil(model)
    elif kind == "nan-behind":  # what the loss and the gradient of the step do not show
        register_optimizer_step_post_hook(lambda *_: spoil(model))
    elif kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    elif kind == "dies-saving":
        checkpoint.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    elif kind.startswith("elsewhere"):  # on a machine of its own, for which a relative path means another folder
        os.chdir(tempfile.mkdtemp())
        os.makedirs(f"run/checkpoints/{kind.removeprefix('elsewhere')}")


def spoil(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.startswith("blocks.")).fill_(float("nan"))


def see_an_old_folder():
    """``FAULT`` of kind ``stale``: this process sees no checkpoint behind that step."""
    process, last, kind = (os.environ.get("FAULT") or "-1:-1:").split(":")
    if kind == "stale" and process == os.environ["RANK"]:
        resuming.list_checkpoints = lambda folder: [n for n in checkpoint.list_checkpoints(folder) if n <= int(last)]


if __name__ == "__main__":
    see_an_old_folder()
    if os.environ.get("FAKE_FLOAT64"):
        torch.set_default_dtype(torch.float64)
    if os.environ.get("NO_GATHER"):
        share.gather_to_first = None
    objective.LocalObjective = RealObjective if os.environ.get("REAL") else FakeObjective
    sys.exit(language_model.main(sys.argv[1:]))
