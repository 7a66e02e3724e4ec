"""Auxiliary exits: every segment's end has an exit in every step; gradients are autograd's of the loss that they are said to
add, and without them nothing changes."""

import copy
import pickle

import pytest
import torch
from torch.nn.functional import cross_entropy

from hbll_seq.chains.layer import recurrent_states
from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.auxiliary import segment_ends
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Sweeps

VOCABULARY = 17


def double_lm(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, n_level=3, n_embd=16, n_head=2, context_length=12, default_paths="prefix")
    model = HBLLForCausalLM(HBLLConfig(**{**shape, "exit_rank": 3, **changes})).double()
    with torch.no_grad():
        for p in model.parameters():  # also what begins at zero
            p.add_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model, torch.randint(VOCABULARY, (2, 13))


def local(model, inference, **options):
    """With adapters that are not zero."""
    objective = LocalObjective(model, inference, **options)
    with torch.no_grad():
        for p in objective.auxiliary.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return objective


def gradients(objective, loss):
    for p in objective.parameters():
        p.grad = None
    loss.backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def slow_loss(objective, tokens, step, detaches):
    """The loss of a step by a plain loop: the nats of every exit by its weight. With ``detaches`` the main path's states are
    detached between segments."""
    model, weight = objective.model, objective.inference.auxiliary_exits
    main, *others = objective.sub_networks(step)
    size, path, answers = objective.inference.chunk_size, main.path, tokens[:, 1:].flatten()

    def nats(logits):
        return cross_entropy(logits.flatten(0, 1), answers)

    reached, total = {(): model.embed(tokens[:, :-1])}, 0.0
    for i, n in enumerate(path):
        read = reached[path[:i]]
        (reached[path[: i + 1]],) = model.calls.apply((n,), (read.detach() if detaches and i and i % size == 0 else read,))
    for network in others:
        for i, n in enumerate(network.path):
            if network.path[: i + 1] not in reached:
                (reached[network.path[: i + 1]],) = model.calls.apply((n,), (reached[network.path[:i]],))
    for network in (main, *others):
        for n, w in network.exits.items():
            here = network.path[: network.path.index(n) + 1]
            total = total + w * nats(model.read_out(reached[here], here))
    auxiliary, expected = objective.auxiliary, []
    for row, end in enumerate(range(size, len(path), size)):
        if path[end - 1] not in main.exits:
            state = reached[path[:end]]
            for number in auxiliary.numbers(path[end - 1]):
                (state,) = auxiliary.calls(None).apply((number,), (state,))
            read = state + state @ auxiliary.down[row].T @ auxiliary.up[row].T
            expected.append(nats(model.head(read)))
            total = total + weight * expected[-1]
    return total, expected


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= tolerance * max(1.0, expected[name].abs().max()), name


CASES = [
    (dict(n_level=3), "chunk_size=2", {}),
    (dict(n_level=3), "chunk_size=3", {}),
    (dict(n_level=3), "chunk_size=1", {}),
    (dict(n_level=3), "chunk_size=2", dict(depths="octaves")),
    (dict(n_level=3), "chunk_size=4", dict(depths="few")),  # in some steps block 4 has an exit anyway
    (dict(n_level=4), "chunk_size=4", dict(depths="octaves")),
    (dict(n_level=4, exit_rank=0), "chunk_size=4", dict(depths="octaves")),
    (dict(n_level=3, default_paths="spine"), "chunk_size=2", dict(depths="random")),
    (dict(n_level=3), "chunk_size=2", dict(path=(2, 4, 6, 7))),
    (dict(n_level=3, tie_embeddings=False), "chunk_size=2", {}),
    (dict(n_level=3), "chunk_size=2", dict(recompute=True)),
    (dict(n_level=3), "chunk_size=2,auxiliary_blocks=2", {}),
    (dict(n_level=3), "chunk_size=2,auxiliary_blocks=1", dict(depths="octaves", recompute=True)),
    (dict(n_level=3), "chunk_size=4,auxiliary_blocks=1", dict(depths="few")),  # which in some steps are not used
    (dict(n_level=3, cell="gru"), "chunk_size=3,auxiliary_blocks=2", dict(time="sweeps:chunk_size=12")),
]


@pytest.mark.parametrize("shape, size, options", CASES, ids=str)
@pytest.mark.parametrize("linearization", ["identity", "zero"])
def test_exact_sweeps_have_autograds_gradient_of_the_whole_loss(shape, size, options, linearization):
    model, tokens = double_lm(**shape)
    sweeps = f"sweeps:forward=14,backward=14,{size},auxiliary_exits=0.7,linearization={linearization}"
    objective = local(model, sweeps, **options)
    for step in range(6):
        output = objective(tokens, step=step)
        loss, _ = slow_loss(objective, tokens, step, detaches=False)
        assert abs(output.loss - loss) < 1e-12 and abs(output.node_losses.sum() - loss) < 1e-12
        found = gradients(objective, output.loss)
        expected = gradients(objective, loss)
        for name, p in objective.auxiliary.named_parameters():  # which a step without such an exit gives zeros
            expected.setdefault(f"auxiliary.{name}", torch.zeros_like(p))
        assert_same(found, expected)


@pytest.mark.parametrize("shape, size, options", [case for case in CASES if case[2].get("depths") != "random"], ids=str)
def test_without_an_exchange_each_segment_has_the_gradient_of_states_detached_between_segments(shape, size, options):
    model, tokens = double_lm(**shape)
    sweeps = f"sweeps:forward=14,backward=0,{size},auxiliary_exits=2.5,linearization=zero"
    objective = local(model, sweeps, **options)
    for step in range(3):
        found = gradients(objective, objective(tokens, step=step).loss)
        expected = gradients(objective, slow_loss(objective, tokens, step, detaches=True)[0])
        for name, p in objective.auxiliary.named_parameters():
            expected.setdefault(f"auxiliary.{name}", torch.zeros_like(p))
        assert_same(found, expected)
        whole = gradients(objective, slow_loss(objective, tokens, step, detaches=False)[0])
        blocks = [name for name in found if name.startswith("model.blocks.")]
        assert max((found[name] - whole[name]).abs().max() for name in blocks) > 1e-6  # what is detached is missed


def test_a_weight_of_zero_changes_nothing_bit_for_bit():
    for inference in ("sweeps:chunk_size=2", "sweeps:forward=3,backward=0,chunk_size=2,linearization=zero"):
        results = []
        for more in ("", ",auxiliary_exits=0"):
            model, tokens = double_lm()
            objective = LocalObjective(model, inference + more, depths="octaves")
            output = objective(tokens, step=3)
            results.append((output, gradients(objective, output.loss), torch.get_rng_state()))
            assert objective.auxiliary is None and not any("auxiliary" in name for name in objective.state_dict())
        (one, its, drawn), (other, others, also) = results
        assert torch.equal(one.loss, other.loss) and torch.equal(one.node_losses, other.node_losses)
        assert one.metrics == other.metrics and "ce_auxiliary" not in one.metrics and torch.equal(drawn, also)
        assert its.keys() == others.keys() and all(torch.equal(its[name], others[name]) for name in its)


def test_they_begin_as_the_plain_head_and_belong_to_the_objective_alone():
    model, tokens = double_lm()
    names, before = set(model.state_dict()), torch.get_rng_state()
    objective = LocalObjective(model, "sweeps:chunk_size=2,auxiliary_exits=1", seed=3)
    assert torch.equal(before, torch.get_rng_state())  # drawn from the objective's seed
    again = LocalObjective(model, "sweeps:chunk_size=2,auxiliary_exits=1", seed=3)
    assert torch.equal(objective.auxiliary.down, again.auxiliary.down) and objective.auxiliary.down.any()
    other = LocalObjective(model, "sweeps:chunk_size=2,auxiliary_exits=1", seed=4)
    assert not torch.equal(objective.auxiliary.down, other.auxiliary.down)
    assert objective.auxiliary.down.shape == (3, 3, 16)  # ends, the rank of the model's exit adapters, width
    bare = LocalObjective(double_lm(exit_rank=0, n_embd=24)[0], "sweeps:chunk_size=2,auxiliary_exits=1")
    assert bare.auxiliary.down.shape == (3, 16, 24)
    assert set(model.state_dict()) == names
    assert set(objective.state_dict()) == {f"model.{name}" for name in names} | {"auxiliary.down", "auxiliary.up"}
    assert {id(p) for p in objective.auxiliary.parameters()} <= {id(p) for p in objective.trained_parameters()}
    state = model.embed(tokens[:, :-1])
    for n in (1, 2):
        (state,) = model.calls.apply((n,), (state,))
    plain = cross_entropy(model.head(state).flatten(0, 1), tokens[:, 1:].flatten())
    output = objective(tokens)
    assert abs(output.node_losses[1] - plain) < 1e-12  # of block 2
    assert objective.double().auxiliary.down.dtype == torch.float64


def test_a_model_may_be_given_another_dtype_behind_the_objective():
    """As it may where the maps of a linearization are learned."""
    model, tokens = double_lm()
    objective = local(model, "sweeps:chunk_size=2,auxiliary_exits=1")
    expected = objective(tokens).loss
    model.float()
    output = objective(tokens)
    output.loss.backward()
    assert abs(output.loss - expected) < 1e-4 and objective.auxiliary.up.grad.dtype == torch.float64
    blocks = [torch.nn.Tanh() for _ in range(3)]
    bare = LocalObjective(DepthHierarchy(blocks, torch.nn.Identity(), width=6), "sweeps:chunk_size=2,auxiliary_exits=1")
    assert bare.auxiliary.down.dtype == torch.get_default_dtype()  # of a model without parameters


def test_a_copy_is_the_same_objective():
    model, tokens = double_lm()
    objective = local(model, "sweeps:chunk_size=2,auxiliary_exits=1", depths="octaves")
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(other(tokens).loss, objective(tokens).loss)
        assert other.auxiliary.down is not objective.auxiliary.down
    again = LocalObjective(double_lm()[0], "sweeps:chunk_size=2,auxiliary_exits=1", depths="octaves", seed=4)
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again(tokens).loss, objective(tokens).loss)


def test_under_autocast_the_loss_is_that_of_full_precision_rounded():
    model, tokens = double_lm()
    objective = local(model.float(), "sweeps:chunk_size=2,auxiliary_exits=1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(tokens)
    found = gradients(objective, output.loss)["auxiliary.up"]
    expected = gradients(objective, objective(tokens).loss)["auxiliary.up"]
    assert found.dtype == torch.float32 and (found - expected).norm() < 0.05 * expected.norm()


def test_their_metric_is_their_own():
    model, tokens = double_lm()
    objective = local(model, "sweeps:chunk_size=2,auxiliary_exits=3", depths="octaves")
    plain = LocalObjective(model, "sweeps:chunk_size=2", depths="octaves")
    output, without = objective(tokens), plain(tokens)
    _, expected = slow_loss(objective, tokens, 0, detaches=False)
    assert len(expected) == 1  # of 2, 4, 6 and 7 those of 4 and 6 are the mix's, and the last is the path's own
    expected += [model(tokens[:, :-1], tokens[:, :-1], path=range(1, 1 + n)).logits.flatten(0, 1) for n in (4, 6)]
    expected[1:] = [cross_entropy(logits, tokens[:, 1:].flatten()) for logits in expected[1:]]
    assert abs(output.metrics.pop("ce_auxiliary") - sum(expected) / 3) < 1e-12
    assert output.metrics == without.metrics
    with torch.no_grad():
        evaluated = objective(tokens)
    assert torch.equal(evaluated.loss, output.loss.detach()) and not evaluated.loss.requires_grad
    few = local(model, "sweeps:chunk_size=4,auxiliary_exits=3", depths="few")
    taken = [objective_has_one(few, step) for step in range(12)]
    assert {True, False} == set(taken)
    (plain,) = {float(few(tokens, step=step).metrics["ce_auxiliary"]) for step in range(12) if not taken[step]}
    (own,) = {float(few(tokens, step=step).metrics["ce_auxiliary"]) for step in range(12) if taken[step]}
    assert plain == pytest.approx(expected[1].item(), rel=1e-12)  # which the model's own exit behind block 4 has
    assert abs(own - plain) > 1e-3


def objective_has_one(objective, step):
    return 4 not in objective.sub_networks(step)[0].exits


def test_a_hierarchy_without_exits_of_its_own_has_them_too():
    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(7)]
    model = DepthHierarchy(blocks, torch.nn.Linear(6, 4), width=6).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    objective = local(model, "sweeps:chunk_size=3,auxiliary_exits=0.5")
    found = gradients(objective, objective(x, y).loss)
    state, total = x, 0.0
    for n, block in enumerate(blocks, start=1):
        state = block(state)
        if n in (3, 6):
            row = n // 3 - 1
            read = state + state @ objective.auxiliary.down[row].T @ objective.auxiliary.up[row].T
            total = total + 0.5 * cross_entropy(model.head(read), y)
    assert_same(found, gradients(objective, total + cross_entropy(model.head(state), y)))


def test_blocks_begin_as_copies_of_the_last_ones_of_a_segment_and_are_trained_apart():
    model, tokens = double_lm()
    objective = LocalObjective(model, "sweeps:chunk_size=3,auxiliary_exits=1,auxiliary_blocks=2", path=(1, 2, 3, 4, 5, 6, 7))
    assert [objective.auxiliary.numbers(n) for n in objective.auxiliary.ends] == [range(1, 3), range(3, 5)]
    for own, n in zip(objective.auxiliary.blocks, (2, 3, 5, 6)):
        theirs = model.blocks[n - 1].state_dict()
        assert own.state_dict().keys() == theirs.keys() and own is not model.blocks[n - 1]
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.state_dict().items())
    sweeps = "sweeps:chunk_size=4,auxiliary_exits=1,auxiliary_blocks=1"
    mixed = LocalObjective(double_lm(n_level=4)[0], sweeps, depths="prefixes")
    ranges = [mixed.auxiliary.numbers(n) for n in (4, 8, 12)]
    assert ranges == [range(1, 2), range(2, 2), range(2, 2)]  # the mix has exits of its own behind 8 and 12
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    objective(tokens).loss.backward()
    optimizer.step()
    moved = {name for name, p in objective.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("auxiliary.blocks.")} <= moved
    assert not any("auxiliary" in name for name in model.state_dict())


def test_their_blocks_are_counted_as_work_and_put_back():
    """A forward pass and a whole backward pass of each, once: 3."""
    model = small_hierarchy(3)
    work, batch = [], (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    for more in ("", ",auxiliary_exits=1", ",auxiliary_exits=1,auxiliary_blocks=1", ",auxiliary_exits=1,auxiliary_blocks=2"):
        objective = LocalObjective(model, f"sweeps:chunk_size=2{more}")
        before = list(objective.modules())
        work.append(measure_span(objective, *batch).block_work)
        assert list(objective.modules()) == before
    assert work == [21, 21, 21 + 3 * 3, 21 + 6 * 3]


def test_blocks_follow_the_model():
    """In what it trains, and to where it is; and they are trained where what they are copies of is frozen."""
    model, tokens = double_lm(dropout=0.5)
    model.blocks.requires_grad_(False)
    objective = LocalObjective(model.eval(), "sweeps:chunk_size=3,auxiliary_exits=1,auxiliary_blocks=1")
    model.train().float()
    losses = [objective(tokens, step=step).metrics["ce_auxiliary"] for step in (0, 1)]
    assert losses[0] != losses[1] and losses[0].dtype == torch.float32
    assert all(module.training for module in objective.auxiliary.blocks.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in objective.auxiliary.blocks.parameters())
    model.eval()  # the objective is still in training
    output, again = (objective(tokens, step=step) for step in (0, 1))
    assert output.metrics["ce_auxiliary"] == again.metrics["ce_auxiliary"]
    assert not any(module.training for module in objective.auxiliary.blocks.modules())
    found = gradients(objective, output.loss)
    assert all(found[f"auxiliary.{name}"].any() for name, _ in objective.auxiliary.named_parameters() if "blocks" in name)
    assert "blocks={3: 1, 6: 1}" in repr(objective.auxiliary)


def test_recurrent_blocks_are_solved_along_time_as_the_model_s_are(monkeypatch):
    walked = []

    def spied(cell, *arguments):
        walked.append(cell)
        return recurrent_states(cell, *arguments)

    monkeypatch.setattr("hbll_seq.chains.layer.recurrent_states", spied)
    model, tokens = double_lm(cell="gru")
    objective = LocalObjective(model, "sweeps:chunk_size=3,auxiliary_exits=1,auxiliary_blocks=1")
    objective(tokens)
    assert all(any(block.cell is cell for cell in walked) for block in (*model.blocks, *objective.auxiliary.blocks))


def test_dropout_of_blocks_is_that_of_the_step():
    """Its own, not that of the model's blocks, and the same where a step is computed again."""
    model, tokens = double_lm(dropout=0.5)
    sweeps = "sweeps:chunk_size=2,auxiliary_exits=1,auxiliary_blocks=1"
    results = []
    for recompute in (False, True):
        objective = LocalObjective(model, sweeps, recompute=recompute, seed=4)
        torch.manual_seed(len(results))  # the global generator has no part in it
        outputs = [objective(tokens, step=step) for step in (0, 0, 1)]
        results.append([float(output.metrics["ce_auxiliary"]) for output in outputs])
        results.append(gradients(objective, outputs[0].loss))
    assert results[0] == results[2] and results[0][0] == results[0][1] != results[0][2]
    assert_same(results[1], results[3])
    calls, state = objective.auxiliary.calls(7), torch.ones(1, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        (own,), (theirs,) = calls.apply((1,), (state,)), type(calls)(objective.auxiliary.blocks, 7).apply((1,), (state,))
    assert not torch.equal(own, theirs)


def test_a_control_probes_the_main_path_without_them():
    """What it finds is what it finds where there are none."""
    model, tokens = double_lm()
    sweeps = "sweeps:forward=1,backward=1,chunk_size=2,control=adaptive(every=1)"
    plain = LocalObjective(model, sweeps)(tokens).metrics["cosine"]
    assert local(model, f"{sweeps},auxiliary_exits=5")(tokens).metrics["cosine"] == plain < 1 - 1e-3


@pytest.mark.parametrize("size, ends", [(1, (1, 2, 3, 4, 5, 6)), (2, (2, 4, 6)), (3, (3, 6)), (4, (4,)), (6, (6,)), (7, ())])
def test_every_segment_but_the_last_has_an_end(size, ends):
    assert segment_ends(range(1, 8), size) == ends


@pytest.mark.parametrize("call, message", [
    (lambda: Sweeps(auxiliary_exits=-1.0), "auxiliary_exits=-1.0: must be a number of at least 0; 0 takes none"),
    (lambda: Sweeps(auxiliary_blocks=1), "auxiliary_blocks=1 with auxiliary_exits=0: .* give auxiliary_exits a weight, or"),
    (lambda: LocalObjective(double_lm()[0], "sweeps:chunk_size=2,auxiliary_exits=1,auxiliary_blocks=3"),
     "auxiliary_blocks=3 with chunk_size=2: they begin as copies of a segment's last blocks; give at most 2, or a larger"),
    (lambda: Sweeps(auxiliary_exits=1).resolved("time"), "auxiliary_exits=1.0 over time: .* leave it out"),
    (lambda: Sweeps(auxiliary_exits=1).resolved("layer"), "auxiliary_exits=1.0 over the time inside of blocks: "),
    (lambda: LocalObjective(double_lm()[0], "sweeps:chunk_size=7,auxiliary_exits=1"),
     "auxiliary_exits=1.0 with chunk_size=7: 7 blocks are one segment.* of at most 6"),
    (lambda: LocalObjective(double_lm()[0], "sweeps:chunk_size=4,auxiliary_exits=1", depths="octaves"),
     "auxiliary_exits=1.0 with depths=octaves: .* in every step; leave auxiliary_exits out"),
    (lambda: LocalObjective(DepthHierarchy([torch.nn.Linear(6, 6)] * 7, torch.nn.Linear(6, 4)),
                            "sweeps:chunk_size=2,auxiliary_exits=1"),
     "auxiliary_exits=1.0 with a hierarchy of unknown width: give DepthHierarchy the width"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)
