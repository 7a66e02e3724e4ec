"""Time x depth: recurrent blocks in a depth hierarchy, both axes in parallel. Backprop in the limit and not before."""

import math

import pytest
import torch
from helpers.path_cache import PathCache

from hbll_seq.chains.depth import BlockCalls
from hbll_seq.evaluation.span import _Ledger
from hbll_seq.layers.recurrent import Jacobian, RecurrentState
from hbll_seq.layers.recurrent_block import RecurrentBlock
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import AXES, Sweeps, Tree

T = 8
MIXED = ("gru", "transformer", "mingru", "elman", "gru", "transformer", "elman-sigmoid")
STACKS = ["gru", "elman", "mingru", MIXED]
LIMIT = dict(inference=Sweeps(6, 6), time=Sweeps(T - 1, T - 1, 1))


def double_lm(cell, gain=3.0, **changes):
    """Recurrent matrices large enough that no iteration is exact by chance."""
    torch.manual_seed(0)
    model = HBLLForCausalLM(HBLLConfig(**{**dict(vocab_size=17, n_embd=8, n_head=2, context_length=T, cell=cell), **changes}))
    model.double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
            if ".cell." in name:
                p.mul_(gain)
    return model, torch.randint(17, (2, T + 1))


def gradients(objective, tokens, step=0, states=None):
    objective.model.zero_grad()
    output = objective(tokens, step=step, states=states)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("cell", STACKS, ids=str)
@pytest.mark.parametrize("linearization", ["zero", "diagonal"])
@pytest.mark.parametrize("mlp_ratio, mix", [(2, "none"), (0, "none"), (2, "octaves"), (2, "spine")])
def test_backprop_through_depth_and_time_in_the_limit_and_not_before(cell, linearization, mlp_ratio, mix):
    shape = dict(default_paths="prefix", exit_rank=2) if mix == "octaves" else {}
    model, tokens = double_lm(cell, mlp_ratio=max(mlp_ratio, int(cell == MIXED)), **shape)
    exact, reference = gradients(BackpropObjective(model, depths=mix), tokens)

    def objective(forward=6, backward=6, time_forward=T - 1, time_backward=T - 1):
        time = Sweeps(time_forward, time_backward, 1, linearization)
        return LocalObjective(model, Sweeps(forward, backward), depths=mix, time=time)

    output, ours = gradients(objective(), tokens)
    assert len(ours) == len(list(model.parameters()))
    assert difference(ours, reference) < 1e-9
    assert abs(output.loss - exact.loss) < 1e-12
    assert output.states.keys() == exact.states.keys()
    for prefix, state in exact.states.items():
        torch.testing.assert_close(output.states[prefix], state, rtol=0, atol=1e-12)
    one_scan = cell == "mingru" and linearization == "diagonal"  # is exact after one iteration, and none backward
    fewer = [dict(forward=4), dict(backward=5)]  # the first call, f_1(z_0), is an iteration as well
    fewer += [] if one_scan else [dict(time_forward=T - 2), dict(time_backward=T - 2)]
    for less in fewer:
        assert difference(gradients(objective(**less), tokens)[1], reference) > 1e-9, less


@pytest.mark.parametrize("chunk", [2, 3, 7, 8])
@pytest.mark.parametrize("linearization", ["zero", "diagonal"])
def test_chunks_reach_the_limit_in_fewer_iterations(chunk, linearization):
    model, tokens = double_lm("gru")
    _, reference = gradients(BackpropObjective(model), tokens)
    forward, backward = math.ceil(T / chunk) - 1, math.ceil(T / chunk)  # the differentiated iteration is one more
    for fewer_forward, fewer_backward in ((0, 0), (1, 0), (0, 1)):
        if fewer_forward <= forward:
            time = Sweeps(forward - fewer_forward, backward - fewer_backward, chunk, linearization)
            objective = LocalObjective(model, Sweeps(6, 6), time=time)
            is_exact = difference(gradients(objective, tokens)[1], reference) < 1e-9
            assert is_exact == (fewer_forward + fewer_backward == 0)


def test_the_papers_tree_trains_recurrent_blocks_too():
    model, tokens = double_lm("gru")
    output, found = gradients(LocalObjective(model, Tree(sigma=0.0), time=LIMIT["time"]), tokens)
    assert len(found) == len(list(model.parameters())) and output.states == {}
    for depth in (1, 2, 3):
        loss = model(tokens, labels=tokens, path=model.tree.path_for_depth(depth)).loss
        torch.testing.assert_close(output.metrics[f"ce_{depth}"], loss.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", MIXED], ids=str)
@pytest.mark.parametrize("mix, dropout", [("none", 0.0), ("octaves", 0.3), ("ladder", 0.3)])
def test_recomputing_gives_the_same_gradients(cell, mix, dropout):
    """Also where the blocks' estimates were refined for another path in the meantime."""
    model, tokens = double_lm(cell, dropout=dropout, default_paths="prefix" if mix == "octaves" else "spine")
    results = [
        gradients(LocalObjective(model, "sweeps", depths=mix, recompute=r, seed=5, time=Sweeps(chunk_size=2)), tokens, 3)[1]
        for r in (False, True)
    ]
    assert difference(*results) < 1e-12


# ------------------------------------------------------------------------------------------------------- locality


def instrument(model):
    """What each differentiated call of a cell read as its state, and how often any cell was called."""
    log = dict(calls=0, read=[])

    def wrap(method):
        def call(state, projected):
            log["calls"] += 1
            if torch.is_grad_enabled():
                log["read"].append((state.requires_grad, state.grad_fn))
            return method(state, projected)

        return call

    for block in model.blocks:
        if isinstance(block, RecurrentBlock):
            block.cell.differentiate, block.cell.transition = wrap(block.cell.differentiate), wrap(block.cell.transition)
    return log


def most_recurrences_on_a_way(tensor):
    """The largest number of recurrences that one path of the autograd graph leads through."""
    most, stack = {}, [tensor.grad_fn]
    while stack:
        node = stack[-1]
        below = [n for n, _ in node.next_functions if n is not None]
        waiting = [n for n in below if n not in most]
        if waiting:
            stack += waiting
            continue
        most[stack.pop()] = max((most[n] for n in below), default=0) + ("_Composed" in node.name())
    return most[tensor.grad_fn]


@pytest.mark.parametrize("cell", STACKS, ids=str)
@pytest.mark.parametrize("mix", ["none", "octaves"])
def test_no_graph_spans_two_transitions_in_time_or_two_blocks_in_depth(cell, mix, monkeypatch):
    model, tokens = double_lm(cell, default_paths="prefix")
    log, made = instrument(model), []
    original = BlockCalls.apply

    def watched(self, indices, states):
        outputs = original(self, indices, states)
        if torch.is_grad_enabled():
            assert all(state.requires_grad and (state.is_leaf or len(index) == 1) for index, state in zip(indices, states))
            made.extend(zip(indices, outputs))
        return outputs

    monkeypatch.setattr(BlockCalls, "apply", watched)
    output = LocalObjective(model, "sweeps", depths=mix)(tokens)
    assert log["read"] and not any(requires_grad or grad_fn for requires_grad, grad_fn in log["read"])
    assert len(made) == 7 + (5 if mix == "octaves" else 0) and most_recurrences_on_a_way(output.loss) == 0
    for index, state in made:
        is_recurrent = isinstance(model.blocks[index[-1] - 1], RecurrentBlock)
        assert most_recurrences_on_a_way(state) == is_recurrent
    for n, loss in enumerate(output.node_losses, start=1):
        found = torch.autograd.grad(loss, list(model.blocks.parameters()), retain_graph=True)
        touched = {name.split(".")[0] for (name, _), g in zip(model.blocks.named_parameters(), found) if g.any()}
        assert touched == {str(n - 1)}


def test_the_instruments_see_backprop():
    model, tokens = double_lm("gru")
    log = instrument(model)
    BackpropObjective(model)(tokens)
    assert log["calls"] == 7 * T and sum(requires_grad for requires_grad, _ in log["read"]) == 7 * (T - 1)
    calls = LocalObjective(model, "sweeps").calls(0)
    (state,) = calls.apply(((1,),), (model.embed(tokens),))
    (state,) = calls.apply(((1, 2),), (state,))
    assert most_recurrences_on_a_way(state.sum()) == 2


@pytest.mark.parametrize("n_steps", [8, 64])
@pytest.mark.parametrize("time_forward", [0, 3])
def test_the_iterations_of_the_axes_do_not_multiply_nor_grow_with_the_text(n_steps, time_forward):
    model, _ = double_lm("gru", gain=1.0, context_length=64)
    tokens = torch.randint(17, (2, n_steps + 1))
    log = instrument(model)
    objective = LocalObjective(model, Sweeps(3, 4), time=Sweeps(time_forward, chunk_size=1))
    objective(tokens).loss.backward()
    # seven differentiated calls, each after its own iterations; three iterations over depth, which leave out what is exact
    # (f_1 is done at once, f_2 in the first iteration, f_3 in the second, ..); f_7 too, for its estimate
    assert log["calls"] == 7 * (time_forward + 1) + (5 + 4 + 3)


# ------------------------------------------------------------------------------------------------ causality, leaks


@pytest.mark.parametrize("cell", STACKS, ids=str)
def test_what_blocks_read_and_make_does_not_move_with_later_tokens(cell, monkeypatch):
    model, tokens = double_lm(cell, default_paths="prefix")
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 17  # read at position 5, the target of position 4
    seen = []
    original = BlockCalls._run

    def watched(self, index, state, *hints):
        output = original(self, index, state, *hints)
        seen.append((state.detach(), output.detach()))
        return output

    monkeypatch.setattr(BlockCalls, "_run", watched)
    for ids in (tokens, changed):
        LocalObjective(model, "sweeps", depths="octaves", time="sweeps:chunk_size=2")(ids)
    half = len(seen) // 2
    assert half > 10
    for before, after in zip(seen[:half], seen[half:], strict=True):
        for one, other in zip(before, after):
            torch.testing.assert_close(one[:, :5], other[:, :5], rtol=0, atol=1e-12)
            assert (one[:, 5:] - other[:, 5:]).abs().max() > 1e-6


@pytest.mark.parametrize("options", [dict(), dict(depths="octaves"), dict(time=Sweeps(0, 0))], ids=str)
def test_random_tokens_cannot_be_predicted(options):
    """On i.i.d. tokens no loss on fresh batches may fall below ln V, with the state carried from batch to batch."""
    torch.manual_seed(0)
    shape = dict(vocab_size=17, n_level=2, n_embd=16, context_length=12, cell="gru", default_paths="prefix")
    model = HBLLForCausalLM(HBLLConfig(**shape))
    objective = LocalObjective(model, "sweeps", **options)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    seen, states = [], None
    for step in range(80):
        output = objective(torch.randint(17, (16, 13), generator=generator), step=step, states=states)
        states = output.states
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step >= 50:
            seen.append([value.item() for name, value in output.metrics.items() if name.startswith("ce")])
    for values in zip(*seen):
        assert math.log(17) - 0.02 < sum(values) / len(values) < math.log(17) + 0.5


@pytest.mark.slow
def test_what_is_trained_is_the_plain_network_and_needs_credit_through_time():
    """x_t = x_{t-5}: no loss below ln 8 without memory; the same iterations without adjoints back in time learn nothing."""
    reached = {}
    for backward in (AXES["layer"].backward, 0):
        torch.manual_seed(0)
        model = HBLLForCausalLM(HBLLConfig(vocab_size=8, n_level=2, n_embd=32, cell="gru", mlp_ratio=1))
        linearization = "diagonal" if backward else "zero"  # whose scan carries adjoints as well
        time = Sweeps(backward=backward, linearization=linearization)
        objective = LocalObjective(model, Sweeps(2, 2), time=time)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for step in range(130):
            tokens = torch.randint(8, (32, 5), generator=generator).repeat(1, 5)[:, :21]
            output = objective(tokens, step=step)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        plain = model(tokens, labels=tokens).loss.item()
        assert abs(plain - objective(tokens).metrics["ce"].item()) < 0.1
        reached[backward] = plain
    assert reached.pop(0) > 1.9 > 1.6 > reached.popitem()[1]


# -------------------------------------------------------------------------------------------------- carried states


@pytest.mark.parametrize("mix", ["none", "octaves"])
def test_carried_states_join_windows(mix):
    """Each path carries its own: what deployment would have after the same tokens."""
    model, _ = double_lm("gru", default_paths="prefix")
    tokens = torch.randint(17, (2, 3 * T + 1))
    ours, exact = LocalObjective(model, **LIMIT, depths=mix), BackpropObjective(model, depths=mix)
    states, reference, nats = None, None, []
    for w in range(3):
        window = tokens[:, w * T : (w + 1) * T + 1]
        expected, theirs = gradients(exact, window, states=reference)
        output, mine = gradients(ours, window, states=states)
        assert difference(mine, theirs) < 1e-9
        states, reference = output.states, expected.states
        nats.append(output.metrics["ce"])
        assert not any(state.requires_grad for state in states.values())
        with torch.no_grad():  # evaluation gives the same numbers
            torch.testing.assert_close(ours(window, states=states).loss, ours(window, states=states).loss.detach())
    whole = model(tokens, labels=tokens).loss
    torch.testing.assert_close(sum(nats) / 3, whole.detach(), rtol=0, atol=1e-9)
    paths = [model.resolve_path()] if mix == "none" else [model.tree.path_for_depth(k) for k in range(1, 8)]
    assert set(states) == {path[:i] for path in paths for i in range(1, len(path) + 1)}
    cache = PathCache(model, paths)
    with torch.no_grad():
        cache.append(tokens[:, :-1])
        for path in paths:
            cache.advance(path)
    for prefix, state in states.items():
        torch.testing.assert_close(state, cache._entries[prefix].state.hidden, rtol=0, atol=1e-9)


def test_a_state_changes_what_a_block_makes_and_only_there():
    model, tokens = double_lm(MIXED)
    zero = LocalObjective(model, "sweeps")(tokens)
    recurrent = {tuple(range(1, n + 1)) for n, kind in enumerate(MIXED, start=1) if kind != "transformer"}
    assert set(zero.states) == recurrent
    other = LocalObjective(model, "sweeps")(tokens, states={k: 0.5 * torch.ones_like(v) for k, v in zero.states.items()})
    assert abs(other.loss - zero.loss) > 1e-4
    unknown = LocalObjective(model, "sweeps")(tokens, states={(4,): torch.ones_like(zero.states[(1,)])})
    assert torch.equal(unknown.loss, zero.loss)  # of a path that this step does not read
    (y,) = BlockCalls(model.blocks, carried={(1,): zero.states[(1,)]}).apply(((1,),), (model.embed(tokens),))
    expected, _ = model.blocks[0](model.embed(tokens), RecurrentState(zero.states[(1,)]))
    assert torch.equal(y, expected)


def test_bfloat16_gradients_are_whole_and_near():
    model, tokens = double_lm("gru", gain=1.0)
    model.float()
    objective = LocalObjective(model, "sweeps")
    _, reference = gradients(objective, tokens)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(tokens)
    output.loss.backward()
    assert output.loss.isfinite()
    for name, p in model.named_parameters():
        cosine = torch.nn.functional.cosine_similarity(p.grad.flatten(), reference[name].flatten(), dim=0)
        assert cosine > 0.97, (name, cosine)


@pytest.mark.parametrize(
    "options, message",
    [
        ("forward=-1", "forward=-1.*at least 0"),
        ("backward=true", "backward='true'.*whole number"),
        ("chunk_size=0", "chunk_size=0.*at least 1"),
        ("linearization=identity", "linearization='identity' over the time inside of blocks: allowed are zero, diagonal"),
        ("linearization=shared_matrix", "linearization='shared_matrix' over the time inside of blocks"),
        ("init=zeros", "init='zeros' over the time inside of blocks: allowed are state"),
        ("clip=0.5", "clip=0.5 over the time inside of blocks.*leave it out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LocalObjective(double_lm("gru")[0], "sweeps", time=f"sweeps:{options}")


def test_states_belong_to_paths():
    model, tokens = double_lm("gru")
    states = LocalObjective(model, "sweeps")(tokens).states
    with pytest.raises(ValueError, match="states with inference='tree'.*sweeps"):
        LocalObjective(model, "tree")(tokens, states=states)
    with pytest.raises(ValueError, match="inference='v_cycles' with recurrent blocks.*sweeps"):
        LocalObjective(model, "v_cycles")


# ------------------------------------------------------------------------------------------------------------ span


def span_in_cells(model, objective, tokens, monkeypatch):
    """The longest chain of calls of cells, and of products with their Jacobians, that depend on each other: until the loss is
    known, and until every gradient is."""
    ledger = _Ledger()

    def counted(method):
        def call(*arguments):
            result = method(*arguments)
            output = result[0] if isinstance(result, tuple) else result
            ledger.set_stamp(output, max(ledger.stamp(a) for a in arguments if isinstance(a, torch.Tensor)) + 1)
            return result

        return call

    with monkeypatch.context() as patch:
        for block in model.blocks:
            for name in ("transition", "differentiate"):
                patch.setattr(block.cell, name, counted(getattr(block.cell, name)), raising=False)
        patch.setattr(Jacobian, "vjp", counted(Jacobian.vjp))
        with ledger:
            loss = objective(tokens).loss
            forward = ledger.stamp(loss)
            found = torch.autograd.grad(loss, list(model.parameters()))
            return forward, max(ledger.stamp(gradient) for gradient in found)


@pytest.mark.parametrize("mix", ["none", "octaves"])
def test_span_over_both_axes_does_not_grow_with_the_text_nor_with_the_blocks(mix, monkeypatch):
    spans = {}
    for n_level in (2, 3, 4):
        model, _ = double_lm("gru", gain=1.0, n_level=n_level, default_paths="prefix")
        ours = LocalObjective(model, Sweeps(2, 2), depths=mix, time=Sweeps(chunk_size=4))
        for n_steps in (16, 32):
            tokens = torch.randint(17, (2, n_steps + 1))
            spans[n_level, n_steps] = span_in_cells(model, ours, tokens, monkeypatch)
        exact = span_in_cells(model, BackpropObjective(model, depths=mix), tokens, monkeypatch)
        assert exact[0] >= 32 + 2**n_level - 2  # the wavefront: its forward chain alone
    assert all(spans[n_level, 16] == spans[n_level, 32] for n_level in (2, 3, 4))
    # K + 2 differentiated calls and M + 1 products, of as many iterations over time, each of which walks four tokens
    call, product = 4 * (AXES["layer"].forward + 1), 4 * AXES["layer"].backward
    alone = 4 * call + 3 * product
    for n_level in (2, 3, 4):  # the blocks of a branch are walked, there and back
        walked = 0 if mix == "none" else (n_level - 1) * (call + product)
        assert spans[n_level, 32][1] <= alone + walked
    assert mix == "octaves" or spans[4, 32] == spans[3, 32] == (4 * call, alone)


@pytest.mark.parametrize("inference", ["sweeps", "sweeps:forward=2,backward=1,chunk_size=2"])
def test_without_gradients_losses_and_states_are_those_of_training(inference):
    model, tokens = double_lm("gru")
    objective = LocalObjective(model, inference, time="sweeps:forward=2,backward=1,chunk_size=3")
    trained = objective(tokens)
    with torch.no_grad():
        measured = objective(tokens)
    torch.testing.assert_close(measured.loss, trained.loss.detach(), rtol=1e-12, atol=1e-12)
    assert trained.states.keys() == measured.states.keys() and len(trained.states)
    for prefix, state in trained.states.items():
        torch.testing.assert_close(measured.states[prefix], state, rtol=1e-12, atol=1e-12)


def test_iterations_that_are_exact_over_depth_still_refine_recurrent_blocks_over_time(monkeypatch):
    """Every evaluation of a later segment goes on from its last estimate in time; other blocks have no use for one."""
    refined, original = [], BlockCalls._run

    def watched(self, index, state, *hints):
        if not torch.is_grad_enabled():
            refined.append(index[-1])
        return original(self, index, state, *hints)

    monkeypatch.setattr(BlockCalls, "_run", watched)
    for cell, expected in (("gru", [5, 6, 7]), ("transformer", [])):
        model, tokens = double_lm(cell)
        LocalObjective(model, Sweeps(1, 1, 4))(tokens)
        assert refined == expected
        refined.clear()
