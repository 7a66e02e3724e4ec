"""Sigmoid MLPs on MNIST without residual connections or normalisation: local losses on the tree beside backprop.

    python train/experiments/mnist_mlp.py --data FOLDER_OF_IDX_FILES

The paper's table (100 epochs there). States are Bernoulli variables given as logits (Eq. 28), so a block
is a sigmoid followed by a linear map. With N layers, N - 1 are blocks of the tree and the last is the head; a further
linear map brings the pixels to the hidden width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from comparisons.depth_methods import DepthMethod
from comparisons.fit import fit
from comparisons.program import as_program
from hbll_seq.data.mnist import load_mnist
from hbll_seq.models.hierarchy import DepthHierarchy
from hbll_seq.utils.arguments import Parser


def sigmoid_mlp(n_layers: int, width: int, n_classes: int = 10) -> DepthHierarchy:
    """``n_layers`` (a power of two) sigmoid layers of ``width`` units, the last of them the classifier."""
    blocks = (nn.Sequential(nn.Sigmoid(), nn.Linear(width, width)) for _ in range(n_layers - 1))
    head = nn.Sequential(nn.Sigmoid(), nn.Linear(width, n_classes))
    return DepthHierarchy(blocks, head, nn.Linear(784, width), state_family="bernoulli")


@torch.no_grad()
def accuracy(model: DepthHierarchy, pixels: Tensor, labels: Tensor, path: Sequence[int]) -> float:
    """Percentage of digits that the network along ``path`` gets right."""
    return 100.0 * (model(pixels, path).argmax(-1) == labels).double().mean().item()


class Batches:
    """Of an epoch in a random order, the last one with the images that are left.

    Args:
        pixels, labels: of all images.
        batch_size: images of a batch.
        seed: the order of an epoch is a function of it and the epoch.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, batch_size: int, seed: int):
        self.pixels, self.labels, self.batch_size, self.seed = pixels, labels, batch_size, seed
        self.order = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.labels) // self.batch_size)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels and labels of a step; steps are asked for one after the other."""
        epoch, place = divmod(step, len(self))
        if place == 0:
            generator = torch.Generator().manual_seed(self.seed * 1000 + epoch)
            self.order = torch.randperm(len(self.labels), generator=generator)
        index = self.order[place * self.batch_size :][: self.batch_size]
        return self.pixels[index], self.labels[index]


def train(objective_name: str, n_layers: int, args: argparse.Namespace, data: dict) -> dict:
    """Trains one network and returns its test accuracy by depth."""
    torch.manual_seed(args.seed)
    model = sigmoid_mlp(n_layers, args.width)
    method = {"tree": DepthMethod.named("tree:state_weight=1.0"), "backprop": DepthMethod.named("backprop")}[objective_name]
    objective = method.objective(model)
    batches = Batches(*data["train"], args.batch_size, args.seed)
    fitted = fit(objective, torch.optim.AdamW(objective.parameters(), lr=args.lr), batches, args.epochs * len(batches),
                 title=f"{objective_name} {n_layers} layers")  # fmt: skip
    depths = sorted({1, model.tree.n_level, model.tree.n_nodes}) if objective_name == "tree" else [model.tree.n_nodes]
    by_depth = {k: accuracy(model, *data["test"], model.tree.path_for_depth(k)) for k in depths}
    return {"objective": objective_name, "layers": n_layers, "width": args.width, "epochs": args.epochs, "seed": args.seed,
            "accuracy_by_blocks": by_depth, "seconds": round(fitted.seconds, 1)}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Trains every network, prints the table, and writes it as JSON where asked."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", default="ylecun/mnist", help="folder of the four idx files, or a Hub id (default: ylecun/mnist)")
    add("--layers", type=int, nargs="+", default=[4, 8, 16], help="sigmoid layers, powers of two (default: 4 8 16)")
    add("--width", type=int, default=100, help="units of a layer (default: 100)")
    add("--epochs", type=int, default=5, help="passes over the images (default: 5; the paper: 100)")
    add("--batch-size", type=int, default=64, help="images of a batch (default: 64)")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: 1e-3)")
    add("--seed", type=int, default=0, help="of weights and order (default: 0)")
    add("--train-images", type=int, help="use only so many images (default: all)")
    add("--threads", type=int, default=1, help="small matrices gain nothing from more (default: 1)")
    add("--output", type=Path, help="JSON file to write (default: none)")
    args = parser.parse_args(argv)
    for n_layers in args.layers:
        if n_layers < 2 or n_layers & (n_layers - 1):
            raise ValueError(f"layers={n_layers}: a tree needs a power of two, such as 4, 8 or 16")
    torch.set_num_threads(args.threads)
    data = {split: load_mnist(args.data, split) for split in ("train", "test")}
    data["train"] = tuple(t[: args.train_images] for t in data["train"])
    runs = []
    for n_layers in args.layers:
        runs += [train(name, n_layers, args, data) for name in ("backprop", "tree")]
        if args.output:
            args.output.write_text(json.dumps(runs, indent=1) + "\n")
    print(f"test accuracy in %, {args.epochs} epochs, {args.width} units")
    for run in runs:
        paths = ", ".join(f"{k} blocks {value:.2f}" for k, value in run["accuracy_by_blocks"].items())
        print(f"{run['layers']:>3} layers, {run['objective']:>8}: {paths}")
    return runs


if __name__ == "__main__":
    as_program(main)
