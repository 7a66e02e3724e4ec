"""What can stand for a chunk of time: how much of it do diagonals and learned matrices explain?

    python train/experiments/bench_maps.py --data FOLDER_OF_IDX_FILES          # permuted MNIST in 64 steps: some minutes
    python train/experiments/bench_maps.py --data FOLDER_OF_IDX_FILES --n 16

A GRU is trained by BPTT on permuted MNIST. Then, for chunks of c steps and on images that nothing was fitted to:

    forward    what the chunk does to the difference between s_0, the first estimate of every state, and the true state
               that it begins with
    backward   what it does to the exact adjoint of the loss at its end

Of both, the share of the variance that is explained by the product of the steps' diagonals, by one matrix for all chunks and
images, by both together (the matrix fitted to what the diagonals leave), and by a matrix for each chunk's place in the
sequence. And how far off, relative to their norm, the states are after K forward iterations with A = 0, with the diagonal,
and with maps that were learned as in training, the weights being held.

New names in version 0.2: --forward (was --sweeps), --chunk-sizes (--chunks).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from comparisons.program import as_program
from comparisons.runs import Length, train_classifier
from comparisons.tasks import Classes
from comparisons.time_methods import TimeMethod
from hbll_seq.chains.time import TimeChain, TimeRows
from hbll_seq.data.mnist import load_mnist
from hbll_seq.engine.iterations import Iterations
from hbll_seq.engine.linearization.base import Diagonal, Zero
from hbll_seq.engine.linearization.regression import ridge_factor
from hbll_seq.engine.linearization.shared_matrix import SharedMatrix, SharedMatrixFit
from hbll_seq.engine.solve import solve
from hbll_seq.models.sequence_classification import HBLLClassifierConfig, HBLLForSequenceClassification
from hbll_seq.utils.arguments import Parser
from hbll_seq.utils.atomic import atomic_write

RESULTS = Path(__file__).resolve().parents[1] / "results"
PERMUTATION_SEED = 0  # as in seqmnist.py
#: images that are looked at, and the share of them that maps are fitted to
N_IMAGES, FITTED = 1000, 0.7
#: batches that the learned maps learn from
N_BATCHES = 100


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="ylecun/mnist", help="folder of the four idx files, or a Hub id (default: ylecun/mnist)")
    add("--n", "--steps-per-image", dest="n_steps", type=int, default=64, help="N, steps of an image (default: 64)")
    add("--chunk-sizes", type=int, nargs="+", default=[4, 8], help="c, steps of a chunk; each divides N (default: 4 8)")
    add("--forward", type=int, nargs="+", default=[1, 2, 3, 4], help="forward iterations K (default: 1 2 3 4)")
    add("--hidden", type=int, default=128, help="width of the state (default: 128)")
    add("--epochs", type=int, default=4, help="of training by BPTT (default: 4)")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW (default: 2e-3)")
    add("--train-images", type=int, default=12000, help="use only the first so many (default: 12000)")
    add("--batch-size", type=int, default=128, help="images of a batch (default: 128)")
    add("--seed", type=int, default=0, help="of weights and order (default: 0)")
    add("--threads", type=int, help="CPU threads (default: as torch is set up)")
    add("--output", type=Path, help="JSON file (default: train/results/bench_maps-N.json)")
    args = parser.parse_args(argv)
    for c in args.chunk_sizes:
        if c < 1 or args.n_steps % c or args.n_steps // c < 2:
            raise ValueError(f"chunk-sizes={c} with n={args.n_steps}: must divide it into 2 chunks or more")
    if min(args.forward) < 1:
        raise ValueError(f"forward={min(args.forward)}: must be at least 1, or there is nothing to learn from")
    if args.output is None:
        args.output = RESULTS / f"bench_maps-{args.n_steps}.json"
    return args


def exact_states(cell, projected: Tensor, s0: Tensor) -> Tensor:
    """s_0 .. s_N, [N + 1, B, H], one transition after the other."""
    states = [s0]
    for given in projected:
        states.append(cell.transition(states[-1], given))
    return torch.stack(states)


def exact_adjoints(model: HBLLForSequenceClassification, states: Tensor, projected: Tensor, labels: Tensor):
    """d loss / d s_1 .. d s_N [N, B, H] of the exact states, and the Jacobians of all transitions at them."""
    read = states[1:].clone().requires_grad_(True)
    with torch.enable_grad():
        (upstream,) = torch.autograd.grad(model.nats(read, labels), read)
    _, jacobian = model.cell.differentiate(states[:-1], projected)
    adjoints = upstream.clone()
    for n in reversed(range(len(upstream) - 1)):
        adjoints[n] += jacobian.between(n + 1, n + 2).vjp(adjoints[n + 1 : n + 2])[0]
    return adjoints, jacobian


def walk(cell, starts: Tensor, projected: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """What the chunks [n, B, H] come to, and the products of their diagonals."""
    product = torch.ones_like(starts)
    for p in range(c):
        starts, jacobian = cell.differentiate(starts, projected[p::c])
        product = product * jacobian.diagonal()
    return starts, product


def explained(change: Tensor, response: Tensor, diagonals: Tensor) -> dict[str, float]:
    """Shares of the variance of ``response`` [n, B, H] to ``change``, of images that nothing was fitted to."""
    n_fitted = int(FITTED * change.shape[1])
    held = response[:, n_fitted:]

    def share(predicted: Tensor) -> float:
        off = held - predicted[:, n_fitted:]
        return round(1.0 - (off.square().sum() / held.square().sum()).item(), 4)

    def fitted(x: Tensor, y: Tensor) -> Tensor:
        x, y = x[:, :n_fitted].flatten(0, 1).double(), y[:, :n_fitted].flatten(0, 1).double()
        return torch.cholesky_solve(x.T @ y / len(x), ridge_factor(x.T @ x / len(x))[0]).float()

    by_diagonals = diagonals * change
    rows = zip(change.split(1), response.split(1))
    return {
        "diagonals": share(by_diagonals),
        "one matrix": share(change @ fitted(change, response)),
        "both": share(by_diagonals + change @ fitted(change, response - by_diagonals)),
        "a matrix for each place": share(torch.cat([x @ fitted(x, y) for x, y in rows])),
    }


@torch.no_grad()
def explained_by_chunk(model: HBLLForSequenceClassification, pixels: Tensor, labels: Tensor, c: int) -> dict[str, dict]:
    """:func:`explained`, forward and backward, of chunks of c steps."""
    cell, projected = model.cell, model.cell.project(model.symbols(model.chunks(pixels)))
    states = exact_states(cell, projected, model.initial_state(len(pixels)))
    starts, estimate = states[:-1:c], states[:1].expand(len(states) // c, -1, -1)
    (walked, _), (from_estimate, diagonals) = (walk(cell, each, projected, c) for each in (starts, estimate))
    later = slice(1, None)  # the first chunk begins with an exact state
    forward = explained((starts - estimate)[later], (walked - from_estimate)[later], diagonals[later])

    adjoints, jacobian = exact_adjoints(model, states, projected, labels)
    adjoint = change = adjoints[2 * c - 1 :: c]  # at the ends of all chunks but the first, whose beginning nothing reads
    product = torch.ones_like(change)
    for p in range(c):
        step = jacobian.between(2 * c - 1 - p, None, c)
        adjoint, product = step.vjp(adjoint), product * step.diagonal()
    return {"forward": forward, "backward": explained(change, adjoint, product)}


class ReadChain(TimeChain):
    """A chain that keeps what its differentiated calls read."""

    def linearize(self, s0: Tensor, chunk_size: int) -> TimeRows:
        """See :meth:`TimeChain.linearize`."""
        return ReadRows(self, chunk_size)


class ReadRows(TimeRows):
    """See :class:`ReadChain`."""

    def __init__(self, chain: TimeChain, chunk_size: int):
        super().__init__(chain, chunk_size)
        self._read: list[Tensor] = []

    def call(self, rows: slice, states: Tensor) -> Tensor:
        """See :meth:`TimeRows.call`."""
        self._read.append(states)
        return super().call(rows, states)

    @property
    def read(self) -> Tensor:
        """s_0 .. s_{N-1}, [N, B, H]."""
        return torch.stack(self._read, dim=1).flatten(0, 1)[: self.chain.n_steps]


def errors_of_states(
    model: HBLLForSequenceClassification, pixels: Tensor, c: int, iterations: int, batch_size: int
) -> dict[str, float]:
    """How far off the states are that the differentiated iteration reads after K others, by approximation of Jacobians."""
    cell = model.cell
    project: Callable[[Tensor], Tensor] = lambda x: cell.project(model.symbols(model.chunks(x))).detach()
    fit, s0 = SharedMatrixFit(cell.hidden_size, iterations), model.initial_state(batch_size)
    *batches, last = pixels.split(batch_size)[: N_BATCHES + 1]
    for batch in batches:
        taught = Iterations(iterations, chunk_size=c, linearization=SharedMatrix())
        solve(TimeChain(cell, project(batch)), s0, taught, learned=fit, learn=True)
        fit.end_step()
    projected, s0 = project(last), s0[: len(last)]
    with torch.no_grad():
        exact = exact_states(cell, projected, s0)[:-1]
    errors = {}
    for kind in (Zero(), Diagonal(), SharedMatrix()):
        learned = fit if isinstance(kind, SharedMatrix) else None
        walked = Iterations(iterations, chunk_size=c, linearization=kind)
        read = solve(ReadChain(cell, projected), s0, walked, learned=learned).linearized.read
        errors[kind.name] = round(((read - exact).norm() / exact.norm()).item(), 4)
    return errors


def main(argv: Sequence[str] | None = None) -> dict:
    """Trains the network, prints both tables, writes and returns them."""
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pixels, labels = (t[: args.train_images] for t in load_mnist(args.data, "train"))
    config = HBLLClassifierConfig(n_steps=args.n_steps, hidden_size=args.hidden, permutation_seed=PERMUTATION_SEED)
    length = Length(args.batch_size, max(1, args.epochs * (len(labels) // args.batch_size)))
    task = Classes({"train": (pixels, labels), "test": load_mnist(args.data, "test")})
    model, run = train_classifier(TimeMethod.named("bptt"), args.lr, args.seed, config, task, length)
    setting = {**config.to_dict(), "steps": length.steps, "lr": args.lr, "seed": args.seed, "train_images": len(labels)}
    found = {"setting": setting, "accuracy": run["test"]["deployed"], "explained": [], "errors": []}
    print(f"GRU {args.hidden}, N = {args.n_steps}, trained by BPTT to {run['test']['deployed']:.2f}% of the test images")
    print("share of the variance explained, images that were not fitted:")
    for c in args.chunk_sizes:
        for way, shares in explained_by_chunk(model, pixels[:N_IMAGES], labels[:N_IMAGES], c).items():
            found["explained"].append({"chunk_size": c, "way": way, **shares})
            print(f"  c = {c:>2}  {way:>8}  " + "  ".join(f"{name} {value:.3f}" for name, value in shares.items()))
    print("error of the states relative to their norm:")
    for c in args.chunk_sizes:
        for k in args.forward:
            errors = errors_of_states(model, pixels, c, k, args.batch_size)
            found["errors"].append({"chunk_size": c, "forward": k, **errors})
            print(f"  c = {c:>2}  K = {k}  " + "  ".join(f"{name} {value:.3f}" for name, value in errors.items()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    as_program(main)
