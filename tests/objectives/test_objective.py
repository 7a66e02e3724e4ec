"""What a training step computes: locality, no leak, free energy, samples, noise, gradients, span."""

import math

import pytest
import torch
from helpers.language_models import small_lm
from torch import nn

from hbll_seq.evaluation.span import measure_span, small_hierarchy
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.objectives.backprop import BackpropObjective
from hbll_seq.objectives.local import LocalObjective
from hbll_seq.objectives.options import Tree
from hbll_seq.tree import inference
from hbll_seq.tree.inference import tree_pass
from hbll_seq.tree.posterior import Gaussian


def touched(loss, parameters):
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("tie", [True, False])
def test_locality_matrix_is_the_trees_pattern(tie):
    model = small_lm(tie_embeddings=tie)
    tree = model.tree
    output = LocalObjective(model)(torch.randint(17, (2, 13)))
    columns = {n: list(block.parameters()) for n, block in enumerate(model.blocks, start=1)}
    columns["embedding"] = [model.embed.weight]
    columns["head"] = [model.head.norm.weight, model.head.projection.weight]
    for n, loss in enumerate(output.node_losses, start=1):
        left, right = tree.parents(n)
        allowed = {n} | ({right} if right < tree.N else {"head"}) | ({"embedding"} if left == 0 else set())
        if tie and allowed & {"embedding", "head"}:
            allowed |= {"embedding"} | ({"head"} if left == 0 else set())  # one matrix, two columns
        assert {name for name, parameters in columns.items() if touched(loss, parameters)} == allowed, f"node {n}"


def test_left_spine_trains_the_embedding_and_right_spine_the_head():
    model = small_lm(tie_embeddings=False)
    losses = LocalObjective(model)(torch.randint(17, (2, 13))).node_losses
    assert [n for n in range(1, 8) if touched(losses[n - 1], [model.embed.weight])] == [1, 2, 4]
    assert [n for n in range(1, 8) if touched(losses[n - 1], [model.head.projection.weight])] == [4, 6, 7]


def tree_states(model, tokens, **options):
    targets = tokens[:, 1:]
    output_energy = lambda n, a: model.target_family.energy(model.head(a), targets)  # noqa: E731
    noise = lambda n, like: torch.randn(like.shape, generator=torch.Generator().manual_seed(n))  # noqa: E731
    z0 = model.embed(tokens[:, :-1])
    return tree_pass(model.calls, model.tree, z0, output_energy, Gaussian(), sigma=0.1, noise=noise, **options)


def test_no_leak_what_a_block_reads_does_not_move_with_later_tokens():
    model = small_lm()
    tokens = torch.randint(17, (1, 13))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 17  # read at position 8, the target of position 7
    before, after = tree_states(model, tokens), tree_states(model, changed)
    for n in range(1, 8):
        torch.testing.assert_close(before.messages[n][:, :8], after.messages[n][:, :8], atol=1e-6, rtol=0)
        assert (before.messages[n][:, 8:] - after.messages[n][:, 8:]).abs().max() > 1e-3
    for n in (2, 4, 6):
        torch.testing.assert_close(before.reads[n][:, :8], after.reads[n][:, :8], atol=1e-6, rtol=0)
        assert (before.targets[n][:, :8] - after.targets[n][:, :8]).abs().max() > 1e-4  # targets may, and do


def test_the_no_leak_test_can_see_a_leak():
    model = small_lm()
    tokens = torch.randint(17, (1, 13))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 17
    before, after = (tree_states(model, t, clean_inputs=False) for t in (tokens, changed))
    assert (before.reads[4][:, :8] - after.reads[4][:, :8]).abs().max() > 1e-4


def test_a_language_model_refuses_to_read_corrected_states():
    with pytest.raises(ValueError, match="clean_inputs=False"):
        LocalObjective(small_lm(), Tree(clean_inputs=False))


def train_on_random_tokens(objective, steps=120):
    """Mean of the lowest cross-entropy that is reported over the last 40 steps, on fresh i.i.d. tokens."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    seen = {}
    for step in range(steps):
        output = objective(torch.randint(17, (16, 13), generator=generator), step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step >= steps - 40:
            for name, value in output.metrics.items():
                if name.startswith("ce"):
                    seen.setdefault(name, []).append(value.item())
    return min(sum(values) / len(values) for values in seen.values())


def strong_correction(monkeypatch):
    """Corrections a thousand times the right size, so that whatever they leak would be seen within a few steps."""
    monkeypatch.setattr(inference, "posterior_mean", lambda a, gradient: a - 250.0 * gradient)


@pytest.mark.parametrize("objective", ["tree", "tree, 2 samples, no noise", "tree, strong correction", "backprop"])
def test_random_tokens_cannot_be_predicted(objective, monkeypatch):
    """On i.i.d. tokens no loss on fresh batches may fall below ln V, however long one trains."""
    model = small_lm(noise=0.0)
    if objective == "tree, strong correction":
        strong_correction(monkeypatch)
    trained = {
        "tree": lambda: LocalObjective(model, Tree(state_weight=0.1)),
        "tree, 2 samples, no noise": lambda: LocalObjective(model, Tree(sigma=0.0, n_samples=2)),
        "tree, strong correction": lambda: LocalObjective(model, Tree(sigma=0.0)),
        "backprop": lambda: BackpropObjective(model),
    }[objective]()
    # The spread of a mean of 16 * 12 * 40 nearly constant terms is far below the 0.02 allowed here.
    assert math.log(17) - 0.02 < train_on_random_tokens(trained) < math.log(17) + 0.5


def test_the_random_token_test_can_see_a_leak(monkeypatch):
    strong_correction(monkeypatch)
    leaky = LocalObjective(small_lm(noise=0.0))
    leaky.inference = Tree(sigma=0.0, clean_inputs=False)  # which a language model's objective refuses at construction
    assert train_on_random_tokens(leaky) < math.log(17) - 0.2


def test_tree_pass_by_hand():
    """Three blocks, no noise: the tree pass against the algorithm written out node by node."""
    torch.manual_seed(0)
    model = small_hierarchy(2)
    f1, f2, f3 = model.blocks
    x, y = torch.randn(5, 2), torch.randint(3, (5,))
    output = LocalObjective(model, Tree(sigma=0.0, state_weight=0.7))(x, y)

    def nll(a):
        return nn.functional.cross_entropy(model.head(a), y, reduction="none")

    z0 = model.embed(x)
    a2 = f2(z0)
    e2 = 2 * nll(a2)
    z2 = (a2 - 0.25 * torch.autograd.grad(e2.sum(), a2, retain_graph=True)[0]).detach()
    loss1 = 0.7 * 0.5 * (f2(f1(z0)) - z2).square().sum(-1).mean()
    loss3 = nll(f3(a2.detach())).mean()
    expected = torch.stack([loss1, 0.5 * e2.mean(), loss3])
    torch.testing.assert_close(output.node_losses, expected)
    parameters = list(model.parameters())
    for ours, theirs in zip(torch.autograd.grad(output.loss, parameters), torch.autograd.grad(expected.sum(), parameters)):
        torch.testing.assert_close(ours, theirs)


def test_samples_average_and_noise_is_a_function_of_seed_step_and_node():
    model = small_lm()
    tokens = torch.randint(17, (2, 13))
    once, other = LocalObjective(model, Tree(sigma=0.1)), LocalObjective(model, Tree(sigma=0.1), seed=1)
    assert torch.equal(once(tokens, step=3).node_losses, once(tokens, step=3).node_losses)
    assert not torch.equal(once(tokens, step=3).node_losses, once(tokens, step=4).node_losses)
    assert not torch.equal(once(tokens, step=3).node_losses, other(tokens, step=3).node_losses)
    silent = [LocalObjective(model, Tree(sigma=0.0, n_samples=s))(tokens).node_losses for s in (1, 3)]
    torch.testing.assert_close(*silent)
    spread = [
        torch.stack([LocalObjective(model, Tree(sigma=1.0, n_samples=s))(tokens, step=i).loss for i in range(12)]).std()
        for s in (1, 16)
    ]
    assert spread[1] < 0.6 * spread[0]  # 16 samples: a quarter of the spread, in expectation


def test_dropout_is_a_function_of_seed_and_step_and_leaves_the_global_stream_alone():
    model = small_lm(dropout=0.5)
    tokens = torch.randint(17, (2, 13))
    for objective in (LocalObjective(model), BackpropObjective(model)):
        before = torch.random.get_rng_state()
        same = [objective(tokens, step=5).loss for _ in range(2)]
        assert torch.equal(*same)
        assert not torch.equal(same[0], objective(tokens, step=6).loss)
        assert torch.equal(before, torch.random.get_rng_state())
        model.eval()
        assert torch.equal(objective(tokens, step=5).loss, objective(tokens, step=5).loss)
        model.train()


def test_objective_under_no_grad_gives_the_same_numbers():
    model = small_lm()
    tokens = torch.randint(17, (2, 13))
    for objective in (LocalObjective(model), BackpropObjective(model)):
        with torch.no_grad():
            silent = objective(tokens, step=1)
        assert not silent.loss.requires_grad
        torch.testing.assert_close(silent.loss, objective(tokens, step=1).loss.detach())


def test_every_trained_parameter_gets_a_gradient_at_every_step():
    model = small_lm()
    for make in (LocalObjective, lambda m: BackpropObjective(m, path=(4, 6)), BackpropObjective, LocalObjective):
        objective = make(model)
        model.zero_grad()
        objective(torch.randint(17, (2, 13))).loss.backward()
        trained = {id(p) for p in objective.trained_parameters()}
        assert all((p.grad is not None) == (id(p) in trained) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_backprop_objective_is_the_plain_networks_loss():
    model = small_lm()
    tokens = torch.randint(17, (2, 13))
    for path in (None, (4,), (2, 4, 6)):
        output = BackpropObjective(model, path=path)(tokens)
        torch.testing.assert_close(output.loss, model(tokens, labels=tokens, path=path).loss)
        assert output.node_losses.shape == (1,) and torch.equal(output.metrics["ce"], output.loss.detach())


@pytest.mark.parametrize("unscored", [0, 7, 25])
def test_ce_metrics_are_the_right_spines_losses(unscored):
    model = small_lm()
    tokens = torch.randint(17, (2, 13))
    labels = tokens.masked_fill(torch.arange(26).view(2, 13) < unscored, -100)
    output = LocalObjective(model, Tree(sigma=0.0))(tokens, labels)
    for depth, block in ((1, 4), (2, 6), (3, 7)):
        loss = model(tokens, labels=labels, path=model.tree.path_for_depth(depth)).loss
        torch.testing.assert_close(output.metrics[f"ce_{depth}"], loss.detach())
        torch.testing.assert_close(output.node_losses[block - 1], loss)
    assert output.metrics["ce"] == output.metrics["ce_3"]
    of_states = torch.stack([output.node_losses[n - 1] for n in (1, 2, 3, 5)]) / 0.1  # without their weight
    torch.testing.assert_close(output.metrics["state"], 2 * of_states.detach().mean())


@pytest.mark.parametrize("make", [LocalObjective, lambda m: LocalObjective(m, "sweeps"), BackpropObjective])
def test_metrics_hold_no_graph(make):
    metrics = make(small_lm())(torch.randint(17, (2, 13))).metrics
    assert metrics and not any(value.requires_grad for value in metrics.values())


def linear_gaussian(width, n_blocks=3):
    """z_n = R_n z_{n-1} + noise with rotations R_n, y = z_N observed with the same noise."""
    blocks = [nn.Linear(width, width, bias=False) for _ in range(n_blocks)]
    for block in blocks:
        nn.init.orthogonal_(block.weight)
    head = nn.Linear(width, width, bias=False)
    nn.init.orthogonal_(head.weight)
    return DepthHierarchy(blocks, head, target_family="gaussian")


def test_free_energy_bounds_the_log_likelihood_from_above():
    """Eq. 10 on a linear-Gaussian chain whose -log p(y | x) is known in closed form (up to the same constant)."""
    torch.manual_seed(0)
    sigma, width = 1.0, 2
    model = linear_gaussian(width)
    x, y = torch.randn(3, width), torch.randn(3, width)
    objective = LocalObjective(model, Tree(sigma, 4000, clean_inputs=False, free_energy=True))
    metrics = objective(x, y).metrics
    chain = torch.eye(width)
    for block in (*model.blocks, model.head):
        chain = block.weight.detach() @ chain
    # p(y | x) = N(chain x, 4 sigma^2 I); dropping d/2 log(2 pi sigma^2) on both sides, as the metric does
    exact = ((y - x @ chain.T).square().sum(-1) / (2 * 4 * sigma**2) + 0.5 * width * math.log(4)).mean()
    assert metrics["free_energy"] > exact
    assert metrics["free_energy"] < exact + 2  # a bound that says something
    parts = [v for name, v in metrics.items() if name.startswith("free_energy_")]
    torch.testing.assert_close(metrics["free_energy"], sum(parts))
    assert sum(name.startswith("free_energy_level") for name in metrics) == 2


@pytest.mark.parametrize("n_blocks", [1, 3, 7])
def test_free_energy_is_the_expected_log_ratio(n_blocks):
    """Eq. 10 written out with torch's own densities at the same samples; both are means over 20,000 of them."""
    torch.manual_seed(1)
    width, sigma, n_samples = 8, 0.7, 20_000
    model = linear_gaussian(width, n_blocks)
    x, y = torch.randn(1, width), torch.randn(1, width)
    objective = LocalObjective(model, Tree(sigma, n_samples, clean_inputs=False, free_energy=True))
    metrics = objective(x, y).metrics
    expanded = [t.repeat_interleave(n_samples, dim=0) for t in (x, y)]
    _, result = objective._run_tree(x, y, step=0)
    states = {0: expanded[0], **result.targets}
    ratio = 0.0
    for n in range(1, model.tree.N):
        q = torch.distributions.Normal(result.means[n], sigma / 2**0.5)
        p = torch.distributions.Normal(model.blocks[n - 1](states[n - 1]), sigma)
        ratio = ratio + (q.log_prob(states[n]) - p.log_prob(states[n])).sum(-1)
    error = 5 * ratio.std().item() / n_samples**0.5  # of the part that is not the same numbers on both sides
    ratio = ratio + 0.5 * (model.head(states[model.tree.N - 1]) - expanded[1]).square().sum(-1)
    assert abs(metrics["free_energy"].item() - ratio.mean().item()) < error
    assert error < 0.3  # small beside the width / 4 that a term of the wrong kind is off by


def test_free_energy_needs_noise_and_local_losses_need_gradients_and_range():
    with pytest.raises(ValueError, match="sigma=0.*give a sigma above 0"):
        LocalObjective(linear_gaussian(2), "tree:free_energy=true")
    objective, x, y = LocalObjective(small_hierarchy(2)), torch.randn(2, 2), torch.tensor([0, 1])
    with torch.inference_mode(), pytest.raises(ValueError, match="use torch.no_grad"):
        objective(x, y)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16 is refused"):
        objective(x, y)
    with pytest.raises(ValueError, match="float16 is refused"):
        LocalObjective(small_hierarchy(2).half())(x.half(), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(objective(x, y).loss)


def test_heads_for_bits_and_vectors():
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    for family, y, expected in [
        ("bernoulli", torch.randint(2, (5, 3)), nn.functional.binary_cross_entropy_with_logits),
        ("gaussian", torch.randn(5, 3), lambda a, b: 0.5 * (a - b).square().mean()),
    ]:
        model = DepthHierarchy([nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 3), target_family=family)
        loss = BackpropObjective(model)(x, y).loss
        torch.testing.assert_close(loss, 3 * expected(model(x), y.float()))  # summed over the 3 features


def test_free_energy_of_bernoulli_states_by_hand():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Sigmoid(), nn.Linear(4, 4))]
    model = DepthHierarchy(blocks, nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3)), state_family="bernoulli")
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    metrics = LocalObjective(model, Tree(free_energy=True))(x, y).metrics
    a = model.blocks[0](x)
    e = 2 * nn.functional.cross_entropy(model.head(a), y, reduction="none")
    z = (a - 0.25 * torch.autograd.grad(e.sum(), a)[0]).detach()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(logits=z), torch.distributions.Bernoulli(logits=a)
    ).sum(-1)
    torch.testing.assert_close(metrics["free_energy_level_0"], kl.mean().detach())
    nll = nn.functional.cross_entropy(model.head(z), y)
    torch.testing.assert_close(metrics["free_energy"], (kl.mean() + nll).detach())


def test_span_grows_with_the_logarithm_of_the_number_of_blocks():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2), torch.tensor([0, 1])
    for n_level in (1, 2, 3, 4, 6):
        model = small_hierarchy(n_level)
        tree, backprop = measure_span(LocalObjective(model), x, y), measure_span(BackpropObjective(model), x, y)
        as_queued = measure_span(LocalObjective(model, Tree(clean_inputs=False)), x, y)
        assert (tree.forward, tree.step) == (n_level + 1, n_level + 5)
        assert as_queued.step == 3 * n_level + 3
        assert backprop.step == 3 * 2**n_level


def test_bad_arguments():
    model = small_lm()
    with pytest.raises(ValueError, match="'loop'.*tree"):
        LocalObjective(model, "loop")
    for options, message in [
        (dict(sigma=-1.0), "sigma=-1.0"),
        (dict(sigma=float("nan")), "sigma=nan"),
        (dict(sigma=float("inf")), "sigma=inf"),
        (dict(sigma="x"), "sigma='x'"),
        (dict(n_samples=True), "n_samples=True"),
        (dict(state_weight=float("inf")), "state_weight=inf"),
        (dict(n_samples=0), "n_samples=0"),
        (dict(state_weight=0), "state_weight=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LocalObjective(model, Tree(**options))
    with pytest.raises(ValueError, match="dyadic"):
        BackpropObjective(model, path=(2, 6))
    with pytest.raises(ValueError, match="6 blocks.*2\\*\\*D - 1.*use 3 or 7"):
        DepthHierarchy([nn.Identity() for _ in range(6)], nn.Identity())
    with pytest.raises(ValueError, match="state_family='categorical': allowed are gaussian, bernoulli"):
        DepthHierarchy([nn.Identity()], nn.Identity(), state_family="categorical")
    with pytest.raises(ValueError, match="labels=None"):
        LocalObjective(small_hierarchy(2))(torch.randn(3, 2))
