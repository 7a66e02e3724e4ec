"""Training with CUDA graphs (training/graphed.py): on a CPU by a capture that runs the step again, on a GPU by torch's."""

import os
import signal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import kill_and_resume as kr
import pytest
import torch
from helpers.fake_cuda import FakeCuda, FakeGraphs, use
from torch import nn

from hbll_seq.objectives.base import ObjectiveOutput
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.training import graphed
from hbll_seq.training.graphed import CaptureFailed, GraphedStep
from hbll_seq.training.presets import resolve
from hbll_seq.training.settings import FREE_ON_RESUME

pytestmark = pytest.mark.usefixtures("blank_figures")
TWELVE = ["--max-steps", "12", "--n-level", "3", "--n-embd", "16", "--depth-mix", "few", "--log-every", "1",
          "--eval-every", "0", "--final-eval-batches", "1", "--sample-tokens", "0"]  # fmt: skip


def trained(lm_options, folder, *more):
    assert kr.load_script().main([*lm_options, *TWELVE, *more, "--output-dir", str(folder)]) == 0
    return folder


def assert_same(one, other):
    assert kr.differences(one, other) == [] and kr.steps_of(one) == list(range(1, 13))
    optimizers = [(run / "checkpoints" / "step-00000012" / "optimizer.safetensors").read_bytes() for run in (one, other)]
    assert optimizers[0] == optimizers[1]


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("more", [["--clip", "0.05"], ["--clip", "0", "--objective", "backprop"]])
def test_a_run_with_graphs_is_the_plain_run(lm_options, tmp_path, monkeypatch, more):
    plain = trained(lm_options, tmp_path / "plain", *more)
    graphs = use(monkeypatch, FakeGraphs())
    assert_same(plain, trained(lm_options, tmp_path / "graphed", *more, "--cuda-graph"))
    assert 3 < graphs.captured < 12  # several draws, and some of them again
    assert graphs.replayed == 12  # one of each graph is the comparison


@pytest.mark.parametrize("first, then", [("--cuda-graph", "--no-cuda-graph"), ("--no-cuda-graph", "--cuda-graph")])
def test_a_run_goes_on_with_or_without_graphs_between_evaluations_and_checkpoints(
    lm_options, tmp_path, monkeypatch, first, then
):
    between = ["--eval-every", "4", "--save-every", "3", "--cell", ",".join(["mingru", "transformer"] * 3 + ["mingru"])]
    plain = trained(lm_options, tmp_path / "plain", *between)
    graphs, folder = use(monkeypatch, FakeGraphs()), tmp_path / "graphed"
    with monkeypatch.context() as patch:
        kr.at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert kr.load_script().main([*lm_options, *TWELVE, *between, first, "--output-dir", str(folder)]) == 143
    assert (graphs.captured > 0) == (first == "--cuda-graph")
    before = graphs.captured
    assert kr.load_script().main(["--resume", then, "--output-dir", str(folder)]) == 0
    assert (graphs.captured > before) == (then == "--cuda-graph")
    assert_same(plain, folder)


def test_beyond_the_most_graphs_steps_are_plain_and_it_is_said_once(lm_options, tmp_path, monkeypatch, capsys):
    plain = trained(lm_options, tmp_path / "plain")
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 2)
    graphs = use(monkeypatch, FakeGraphs())
    capsys.readouterr()
    assert_same(plain, trained(lm_options, tmp_path / "graphed", "--cuda-graph"))
    assert graphs.captured == 2 and capsys.readouterr().err.count("draws more than 2 sets of paths") == 1


def test_autocast_keeps_no_cache_that_a_graph_would_hold(lm_options, tmp_path, monkeypatch, any_precision):
    def noted(objective, *given):
        found.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return forward(objective, *given)

    found, forward = [], LocalObjective._sweep_step
    monkeypatch.setattr(LocalObjective, "_sweep_step", noted)
    use(monkeypatch, FakeGraphs())
    trained(lm_options, tmp_path / "run", "--precision", "bfloat16", "--cuda-graph")
    assert set(found) == {(True, False)}


class AddsUp(FakeGraphs):
    """Gradients of a replay are added to those of the one before."""

    def capture(self, step, began=None, pool=None):
        step.forget()
        step()
        return step


class ReadsTheCapturedBatch(FakeGraphs):
    """What is copied into the inputs later is not seen."""

    def capture(self, step, began=None, pool=None):
        return super().capture(graphed.Step(step.objective, [own.clone() for own in step.inputs], **step.options))


class StaleLoss(FakeGraphs):
    """The loss of the capture, whatever is replayed."""

    def capture(self, step, began=None, pool=None):
        replay, loss = super().capture(step), step().loss.clone()
        return lambda: replay()._replace(loss=loss)


@pytest.mark.parametrize("faulty", [AddsUp, ReadsTheCapturedBatch, StaleLoss])
def test_a_graph_of_another_step_ends_the_run(lm_options, tmp_path, monkeypatch, capsys, faulty):
    use(monkeypatch, faulty(shared=False))
    assert kr.load_script().main([*lm_options, *TWELVE, "--cuda-graph", "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "the graph computes another step than the plain one: relative loss difference" in said
    assert "leave --cuda-graph out (--resume --no-cuda-graph goes on" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_is_refused(lm_options, tmp_path, capsys):
    assert kr.load_script().main([*lm_options, "--cuda-graph", "--output-dir", str(tmp_path / "run")]) == 2
    assert "cuda_graph=True on device 'cpu': it needs a CUDA device; leave --cuda-graph out" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision, close", [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_on_a_gpu_a_run_with_graphs_is_close_to_the_plain_run(lm_options, tmp_path, any_precision, precision, close):
    runs = []
    for more in ([], ["--cuda-graph"]):
        any_precision()
        runs.append(trained(lm_options, tmp_path / f"run{len(runs)}", "--precision", precision, *more))
    losses = [kr.losses_of(run) for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=close)


# ------------------------------------------------------------------------------------------------------- a step alone


class Turns(nn.Module):
    """An objective that trains one of two weights in turn: a draw under which the other has no gradient."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weights, self.scale = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]), scale

    def sub_networks(self, step):
        return [SimpleNamespace(path=(1 + step % 2,), exits={1 + step % 2: 1.0})]

    def forward(self, batch, step):
        loss = self.scale * (self.weights[step % 2] * batch).square().sum()
        return ObjectiveOutput(loss, loss[None], {"ce": loss.detach()}, {})


def test_a_parameter_that_a_draw_leaves_out_has_no_gradient(monkeypatch):
    graphs, objective = use(monkeypatch, FakeGraphs()), Turns()
    step = GraphedStep(objective, "float32")
    for number in range(6):
        batch = torch.randn(1, 2)
        output = step(batch, number)
        trained, other = objective.weights[number % 2], objective.weights[1 - number % 2]
        assert other.grad is None and torch.allclose(trained.grad, 2 * trained.detach() * batch[0].square())
        assert output.loss == output.metrics["ce"] == output.node_losses[0] and not output.loss.requires_grad
        with torch.no_grad():
            trained -= 0.1 * trained.grad  # graphs read the weights as they are
            trained.grad.mul_(100.0)  # as clipping does: nothing of it is left in the next step
    assert graphs.captured == len(step.graphs) == 2


class Both(Turns):
    """An objective that trains both of its weights in every step, and has a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(2))

    def sub_networks(self, step):
        return [SimpleNamespace(path=(1, 2), exits={2: 1.0})]

    def forward(self, batch, step):
        loss = sum(((w + self.shift) * batch).square().sum() for w in self.weights)
        return ObjectiveOutput(loss, loss[None], {"ce": loss.detach()}, {})


class Weighted(Turns):
    """An objective whose steps differ in an exit's weight alone, as with a mix that nobody has written yet."""

    def sub_networks(self, step):
        return [SimpleNamespace(path=(1, 2), exits={2: 1.0 + step % 2})]

    def forward(self, batch, step):
        loss = (1.0 + step % 2) * (self.weights[0] * batch).square().sum()
        return ObjectiveOutput(loss, loss[None], {"ce": loss.detach()}, {(1,): batch})


def test_a_draw_is_its_weights_too_and_what_it_gives_keeps_nothing_alive(monkeypatch):
    graphs, objective = use(monkeypatch, FakeGraphs()), Weighted()
    step, batch = GraphedStep(objective, "float32"), torch.randn(1, 2)
    given = batch.clone()
    step(batch, 0)
    for number in range(4):
        output = step(batch + number, number)
        assert output.loss == (1 + number % 2) * (given + number).square().sum()
        assert not output.node_losses.requires_grad and output.states == {}
    assert graphs.captured == 2
    assert torch.equal(batch, given)  # the graphs have inputs of their own


def _frozen(objective):
    objective.weights[0].requires_grad_(False)


def _moved(objective):
    for weight in objective.weights:
        weight.data = weight.data + 1.0


def _cast(objective):
    objective.double()


def _read_otherwise(objective):
    objective.weights[0].data = objective.weights[0].data.view(torch.float64)  # as where memory is used again


def _replaced(objective):
    objective.weights[0] = nn.Parameter(objective.weights[0].data)


def _other_buffer(objective):
    objective.shift = torch.ones(2)


def _loaded(objective):
    objective.load_state_dict({name: tensor + 2.0 for name, tensor in objective.state_dict().items()})


def _written(objective):
    objective.shift.add_(1.0)


@pytest.mark.parametrize("change, n_captures", [(_frozen, 2), (_moved, 2), (_cast, 2), (_replaced, 2), (_loaded, 1),
                                                (_read_otherwise, 2), (_other_buffer, 2), (_written, 1)])  # fmt: skip
def test_what_becomes_of_the_weights_between_steps_counts(monkeypatch, change, n_captures):
    pools, graphs, objective, plain = [], use(monkeypatch, FakeGraphs()), Both(), Both()
    monkeypatch.setattr(graphed, "capture", lambda step, pool: pools.append(pool) or graphs.capture(step))
    step, batch = GraphedStep(objective, "float32"), torch.randn(1, 2)
    for number in range(6):
        if number == 3:
            change(objective), change(plain)
        output = step(batch, number)
        plain.zero_grad()
        expected = plain(batch, number)
        expected.loss.backward()
        assert torch.equal(output.loss, expected.loss) and output.loss.dtype == expected.loss.dtype
        for ours, theirs in zip(objective.weights, plain.weights):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    assert graphs.captured == n_captures and len(step.graphs) == 1
    assert len(set(map(id, pools))) == n_captures  # torch's pool ends with the last of its graphs


def test_the_graphs_share_one_pool(monkeypatch):
    pools, graphs = [], use(monkeypatch, FakeGraphs())
    monkeypatch.setattr(graphed, "capture", lambda step, pool: pools.append(pool) or graphs.capture(step))
    step = GraphedStep(Turns(), "float32")
    for number in range(3):
        step(torch.randn(1, 2), number)
    assert len(pools) == 2 and pools[0] is pools[1] is not None


class Steep(Turns):
    """An objective whose loss is finite and its gradient is not."""

    def forward(self, batch, step):
        loss = (self.weights[0] - 1.0).square().sum().sqrt()
        return ObjectiveOutput(loss, loss[None], {"ce": loss.detach()}, {})


@pytest.mark.parametrize("objective", [Turns(float("nan")), Steep()])
def test_a_step_that_is_not_finite_is_not_compared(monkeypatch, objective):
    graphs = use(monkeypatch, FakeGraphs())
    output = GraphedStep(objective, "float32")(torch.randn(1, 2), 0)
    assert output.loss.isfinite() == isinstance(objective, Steep) and objective.weights[0].grad.isnan().all()
    assert graphs.captured == 0


@pytest.mark.parametrize("precision", graphed.TOLERANCES)
def test_two_steps_are_one_up_to_the_tolerances(precision):
    loss, gradients = torch.tensor(-2.0), [torch.tensor([3.0, 0.0]), None, torch.tensor(4.0)]
    allowed = graphed.TOLERANCES[precision]
    assert 0 < allowed["loss_difference"] < 3e-3 and 0 < allowed["gradient_difference"] < 0.06  # an error of a tenth is told

    def found(loss_difference=0.0, gradient_difference=0.0, others=None):
        changed = [gradients[0] + torch.tensor([0.0, 5 * gradient_difference]), *gradients[1:]] if others is None else others
        of_both = graphed.differences(loss * (1 - loss_difference), changed, loss, gradients)
        return of_both, graphed.told_apart(of_both, precision)

    assert found() == ({"loss_difference": 0.0, "gradient_difference": 0.0}, "")
    for name, most in allowed.items():
        values, told = found(**{name: 2 * most})
        assert values[name] == pytest.approx(2 * most, rel=1e-2) and name.replace("_", " ") in told and f"{most:g}" in told
        assert found(**{name: most / 2})[1] == "" and "nan" in found(**{name: float("nan")})[1]
    for others in ([gradients[0], torch.zeros(1), gradients[2]], [gradients[0], None, None]):
        values, told = found(others=others)
        assert values["gradient_difference"] == float("inf") and "inf" in told


@pytest.mark.parametrize("n_level, mix, n_draws", [(3, "none", 1), (3, "all", 1), (3, "octaves", 1), (3, "few", 10),
                                                   (4, "few", 78), (4, "octaves", 1287)])  # fmt: skip
def test_how_many_graphs_a_mix_takes(n_level, mix, n_draws):
    """As docs/training.md says, by drawing until nothing new comes."""
    from hbll_seq.objectives.depth_mix import MIX_WEIGHTS, sub_networks_of_step
    from hbll_seq.tree.topology import DyadicTree

    tree = DyadicTree(n_level, "prefix")
    tree.path_for_depth = cache(tree.path_for_depth)
    path = tuple(range(1, tree.N))

    def networks(step):
        return sub_networks_of_step(mix, MIX_WEIGHTS.get(mix, 1.0), tree, path, step)

    of_objective = SimpleNamespace(objective=SimpleNamespace(sub_networks=networks))
    assert len({GraphedStep.draw(of_objective, step) for step in range(15 * n_draws)}) == n_draws
    text = " ".join((Path(__file__).parents[2] / "docs" / "training.md").read_text().split())
    assert "`none`, `all` and `octaves` take one graph, `few` ten" in text
    assert "`few` has 78 draws and `octaves` 1,287" in text


def test_a_batch_of_another_shape_is_refused(monkeypatch):
    use(monkeypatch, FakeGraphs())
    step = GraphedStep(Turns(), "float32")
    step(torch.randn(1, 2), 0)
    with pytest.raises(ValueError, match=r"batch of shape \(3, 2\): the graphs read \(1, 2\)"):
        step(torch.randn(3, 2), 0)


def test_a_step_that_cannot_be_captured_says_why_and_a_full_memory_stays_one(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(graphed, "new_pool", object)

    class Waits(Turns):
        def forward(self, batch, step):
            if cuda.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            return super().forward(batch, step)

    with pytest.raises(ValueError, match="cannot be captured .called a synchronizing CUDA operation.; leave --cuda-graph"):
        GraphedStep(Waits(), "float32")(torch.randn(1, 2), 0)
    monkeypatch.setattr(cuda, "get_sync_debug_mode", None)

    def full(step, pool):
        try:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        except RuntimeError as error:
            raise CaptureFailed("the capture failed") from error

    monkeypatch.setattr(graphed, "capture", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        GraphedStep(Turns(), "float32")(torch.randn(1, 2), 0)


# ------------------------------------------------------------------------------------------------------- a capture


def steps_of(cuda, wrong=()):
    """A step that notes where it was run, and fails where it is told to."""

    class Noted:
        def forget(self):
            cuda.calls.append("forget")

        def __call__(self):
            cuda.calls.append((cuda.stream_now, cuda.mode))
            if cuda.stream_now in wrong or cuda.mode in wrong:
                raise RuntimeError("called a synchronizing CUDA operation")
            return torch.ones(())

    return Noted()


def test_a_capture_warms_up_on_its_stream_looks_for_waits_and_then_captures(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay = graphed.capture(steps_of(cuda), lambda: cuda.calls.append("began"), "pool")
    warm, strict = ["forget", ("side", "default")], ["forget", ("side", "error")]
    assert cuda.calls == warm * graphed.WARMUP + strict + ["forget", "began", ("capturing", "default")]
    assert replay() == 1 and cuda.calls[-1] == "replay"  # the gradients are those of the capture: nothing forgets them
    assert (cuda.stream_now, cuda.mode, cuda.pools) == ("main", "default", ["pool"])


@pytest.mark.parametrize("wrong, kind", [("error", RuntimeError), ("capturing", CaptureFailed)])
def test_a_step_that_waits_is_found_before_a_capture_breaks(monkeypatch, wrong, kind):
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(RuntimeError) as raised:
        graphed.capture(steps_of(cuda, [wrong]))
    assert type(raised.value) is kind and (cuda.stream_now, cuda.mode) == ("main", "default")
    assert str(graphed.first_cause(raised.value)) == "called a synchronizing CUDA operation"


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("values, named, remedy", [
    ({"dropout": 0.1}, "dropout=0.1", {"dropout": 0.0}),
    ({"objective": "tree"}, "sigma=0.005", {"sigma": 0.0}),
    ({"linearization": "low_rank"}, "linearization='low_rank'", {"linearization": "identity"}),
    ({"depth_mix": "none", "forward": 1, "backward": 1}, "linearization='low_rank'", {"linearization": "identity"}),
    ({"control": "adaptive"}, "control='adaptive'", {"control": "none"}),
    ({"cell": "gru", "carry_state": True}, "carry_state=True", {"carry_state": False}),
    ({"grad_accum": 2}, "grad_accum=2", {"grad_accum": 1}),
    ({"block_parallel": 2}, "block_parallel=2", {"block_parallel": 1}),
])  # fmt: skip
def test_what_a_graph_cannot_hold_is_refused(values, named, remedy):
    with pytest.raises(ValueError) as error:
        resolve({"max_steps": 5, "cuda_graph": True}, values)
    assert f"cuda_graph=True with {named}: " in str(error.value) and "leave --cuda-graph out" in str(error.value)
    assert resolve({"max_steps": 5, "cuda_graph": True}, {**values, **remedy}).resolved().cuda_graph
    resolve({"max_steps": 5}, values)


def test_several_processes_are_refused_and_a_resume_may_change_it():
    from hbll_seq.training.graph_settings import check_graph_device

    check_graph_device(torch.device("cuda"), 1)
    with pytest.raises(ValueError, match="cuda_graph=True with 2 processes: .*leave --cuda-graph out"):
        check_graph_device(torch.device("cuda"), 2)
    assert "cuda_graph" in FREE_ON_RESUME
