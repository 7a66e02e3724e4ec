"""CUDA graphs on a CPU: what a capture asks of torch.cuda, and a capture that runs the step again instead of replaying it."""

import contextlib
from types import SimpleNamespace

import torch

from hbll_seq.training import graphed


class FakeCuda:
    """What a capture asks of torch.cuda, in the order in which it does."""

    def __init__(self, monkeypatch):
        self.calls, self.mode, self.stream_now, self.pools = [], "default", "main", []
        for name in ("current_stream", "set_stream", "stream", "graph", "CUDAGraph", "get_sync_debug_mode",
                     "set_sync_debug_mode"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(graphed, "side_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: None, name=self.stream_now)

    def set_stream(self, stream):
        self.stream_now = stream.name

    @contextlib.contextmanager
    def stream(self, stream):
        self.stream_now, before = "side", self.stream_now
        try:
            yield
        finally:
            self.stream_now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.stream_now = "capturing"
        self.pools.append(pool)
        try:
            yield
        except RuntimeError:  # as torch does: the end of a broken capture fails too, and the stream is not put back
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.stream_now = "main"

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


class FakeGraphs:
    """A capture whose replay makes the same step again and writes what comes of it where the capture left it.

    It reads the weights where they lay, and differentiates what needed a gradient, when it was captured.

    Args:
        shared: as graphs that share memory may do, a replay spoils what all others hold.

    Attributes:
        captured, replayed: how often.
    """

    def __init__(self, shared=True):
        self.shared, self.captured, self.replayed, self._held = shared, 0, 0, []

    def capture(self, step, began=None, pool=None):
        self.captured += 1
        step.forget()
        output = step()
        held = [output.loss, output.node_losses, *output.metrics.values(), *(g for g in step.gradients() if g is not None)]
        there = [g is not None for g in step.gradients()]
        lay = [(p.data, p.requires_grad) for p in step.objective.parameters()]

        def put(parameters, values):
            for p, (data, needs) in zip(parameters, values, strict=True):
                p.data = data
                p.requires_grad_(needs)

        self._held.append(held)

        def replay():
            self.replayed += 1
            parameters = list(step.objective.parameters())
            before, now = [p.grad for p in parameters], [(p.data, p.requires_grad) for p in parameters]
            step.forget()
            put(parameters, lay)
            new = step()
            values = [new.loss, new.node_losses, *new.metrics.values(), *(g for g in step.gradients() if g is not None)]
            assert [g is not None for g in step.gradients()] == there
            step.forget()
            put(parameters, now)
            for p, gradient in zip(parameters, before):  # a graph knows nothing of .grad
                p.grad = gradient
            for other in self._held if self.shared else ():
                for tensor in other:
                    tensor.fill_(float("nan"))
            for tensor, value in zip(held, values, strict=True):
                tensor.copy_(value)
            return output

        return replay


def use(monkeypatch, graphs):
    """Runs with ``--cuda-graph`` take these for CUDA's, on a CPU."""
    from hbll_seq.training import devices

    monkeypatch.setattr(graphed, "capture", graphs.capture)
    monkeypatch.setattr(graphed, "new_pool", object)
    monkeypatch.setattr(devices, "check_graph_device", lambda device, n_processes: None)
    return graphs
