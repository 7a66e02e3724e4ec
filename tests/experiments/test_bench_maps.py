"""What stands for a chunk of time: shares are those of maps that are known, adjoints those of autograd, the script runs."""

import json

import pytest
import torch
from helpers.digits import synthetic

import bench_maps
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification


def test_shares_are_those_of_known_maps():
    torch.manual_seed(0)
    change, matrix, diagonals = torch.randn(3, 400, 6), torch.randn(6, 6), torch.rand(3, 400, 6)
    linear = bench_maps.explained(change, change @ matrix, diagonals)
    assert linear["one matrix"] > 0.999 and linear["diagonals"] < 0.9
    diagonal = bench_maps.explained(change, diagonals * change, diagonals)
    assert diagonal["diagonals"] == 1.0 and diagonal["both"] == 1.0 and diagonal["one matrix"] < 0.9
    places = torch.randn(3, 6, 6)
    by_place = bench_maps.explained(change, change @ places, diagonals)
    assert by_place["a matrix for each place"] > 0.999 and by_place["one matrix"] < 0.9
    noise = bench_maps.explained(change, torch.randn(3, 400, 6), diagonals)
    assert all(value < 0.05 for value in noise.values())  # of images that nothing was fitted to


def test_adjoints_and_states_are_those_of_autograd():
    torch.manual_seed(0)
    config = HBLLClassifierConfig(n_inputs=24, n_steps=12, hidden_size=5, permutation_seed=0)
    model = HBLLForSequenceClassification(config).double()
    x, y = torch.rand(3, 24, dtype=torch.float64), torch.randint(10, (3,))
    projected = model.cell.project(model.symbols(model.chunks(x))).detach()
    states = [model.initial_state(3)]
    for given in projected:
        states.append(model.cell.transition(states[-1], given))
        states[-1].retain_grad()
    model.nats(torch.stack(states[1:]), y).backward()
    ours = bench_maps.exact_states(model.cell, projected, model.initial_state(3)).detach()
    torch.testing.assert_close(ours, torch.stack(states).detach(), rtol=0, atol=1e-12)
    with torch.no_grad():
        adjoints, jacobian = bench_maps.exact_adjoints(model, ours, projected, y)
        walked, product = bench_maps.walk(model.cell, ours[:-1:4], projected, 4)
    torch.testing.assert_close(adjoints, torch.stack([s.grad for s in states[1:]]), rtol=0, atol=1e-12)
    torch.testing.assert_close(walked, ours[4::4], rtol=0, atol=1e-12)
    torch.testing.assert_close(product[0], jacobian.diagonal()[:4].prod(0), rtol=0, atol=1e-12)


def test_chunks_are_looked_at_where_they_begin_and_end(monkeypatch):
    torch.manual_seed(0)
    config = HBLLClassifierConfig(n_inputs=24, n_steps=12, hidden_size=5, permutation_seed=0)
    model = HBLLForSequenceClassification(config).double()
    x, y = torch.rand(10, 24, dtype=torch.float64), torch.randint(10, (10,))
    looks = []
    monkeypatch.setattr(bench_maps, "explained", lambda *tensors: looks.append(tensors) or {})
    bench_maps.explained_by_chunk(model, x, y, 4)
    (change, response, _), (adjoints, products, diagonals) = looks
    projected = model.cell.project(model.symbols(model.chunks(x))).detach()
    with torch.no_grad():
        states = bench_maps.exact_states(model.cell, projected, model.initial_state(10))
        exact, jacobian = bench_maps.exact_adjoints(model, states, projected, y)
    for q in (1, 2):  # the chunks from s_4 to s_8 and from s_8 to s_12
        start = states[4 * q].clone().requires_grad_(True)
        from_zero = bench_maps.exact_states(model.cell, projected[4 * q : 4 * q + 4], torch.zeros_like(start))[-1]
        torch.testing.assert_close(change[q - 1], states[4 * q])
        torch.testing.assert_close(response[q - 1], (states[4 * q + 4] - from_zero).detach())
        end = bench_maps.exact_states(model.cell, projected[4 * q : 4 * q + 4], start)[-1]
        torch.testing.assert_close(adjoints[q - 1], exact[4 * q + 3])
        torch.testing.assert_close(products[q - 1], torch.autograd.grad(end, start, exact[4 * q + 3])[0])
        torch.testing.assert_close(diagonals[q - 1], jacobian.diagonal()[4 * q : 4 * q + 4].prod(0))


def test_the_script_runs_and_writes_what_it_prints(tmp_path, capsys):
    synthetic(tmp_path)
    output = tmp_path / "out" / "maps.json"
    argv = ["--data", str(tmp_path), "--n", "8", "--chunk-sizes", "2", "--forward", "1", "3", "--hidden", "6"]
    bench_maps.main([*argv, "--epochs", "1", "--train-images", "320", "--batch-size", "32", "--output", str(output)])
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert [(row["chunk_size"], row["way"]) for row in found["explained"]] == [(2, "forward"), (2, "backward")]
    assert f"one matrix {found['explained'][0]['one matrix']:.3f}" in shown
    one, three = found["errors"]
    assert (one["forward"], three["forward"]) == (1, 3)
    assert three["shared_matrix"] < 1e-6 < one["shared_matrix"]  # (3 + 1) 2 = 8: exact
    assert one["zero"] > 0.01


@pytest.mark.parametrize(
    "option, message",
    [
        (["--chunk-sizes", "3"], "chunk-sizes=3 with n=64"),
        (["--chunk-sizes", "64"], "chunk-sizes=64"),
        (["--forward", "0"], "forward=0"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        bench_maps.main(option)
