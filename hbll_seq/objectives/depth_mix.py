"""Which sub-networks a training step trains besides the main path, so that every depth becomes useful (docs/method.md 2.3).

A *sub-network* is a path and its early exits: blocks after which the head makes a prediction. One with several exits serves
several depths for one evaluation of its blocks: the right spine (4, 6, 7) with an exit after each block holds the spine
family's paths of depths 1, 2 and 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from hbll_seq.tree.topology import DyadicTree


class SubNetwork(NamedTuple):
    """``path``: block numbers; ``exits``: block number on the path -> weight of the loss there; one exit is at the end."""

    path: tuple[int, ...]
    exits: dict[int, float]


def whole(path: tuple[int, ...], weight: float = 1.0) -> SubNetwork:
    """A path with an exit at its end alone."""
    return SubNetwork(path, {path[-1]: weight})


def _random(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    return [whole(tree.sample_path(rng))]


def _nested(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    return [whole(tree.path_for_depth(rng.randint(1, max(1, tree.n_nodes - 1))))]


def _sandwich(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    return [whole(tree.path_for_depth(1), 0.5), whole(tree.path_for_depth(rng.randint(1, max(1, tree.n_nodes - 1))), 0.5)]


def _spine(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    spine = tree.right_spine
    return [SubNetwork(spine, {n: 1.0 / len(spine) for n in spine})]


def _ladder(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    """The spine, and a default path of a random depth between it and the full path."""
    (spine,) = _spine(tree, rng)
    if tree.n_nodes - 1 <= tree.n_level:
        return [spine]
    half = SubNetwork(spine.path, {n: 0.5 * w for n, w in spine.exits.items()})
    return [half, whole(tree.path_for_depth(rng.randint(tree.n_level + 1, tree.n_nodes - 1)), 0.5)]


def _prefixes(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    """The full path itself, with exits where a dyadic jump leads to the output: after 4 and 6 of 7, weight by depth."""
    ends = tree.right_spine[:-1]
    return [SubNetwork(tuple(range(1, tree.N)), {n: n / sum(ends) for n in ends})] if ends else []


def _octaves(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    """Every default path; the octaves of depth (1; 2 and 3; 4 to 7; ..) weigh the same, depths within one too, and those of
    the last, which the full path trains as well, half. Of a deep tree that of one block and five others at random, which
    stand for all others: the expected weights are the same."""
    return _every_depth(tree, rng, lambda k: 2.0 ** -k.bit_length() / (2 if 2 * k >= tree.N else 1), drawn=5)


def _all(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    """As "octaves", weight by one over the depth."""
    return _every_depth(tree, rng, lambda k: 1.0 / k, drawn=5)


def _few(tree: DyadicTree, rng: random.Random) -> list[SubNetwork]:
    """As "all", with two others at random in place of five: less than half the exits, and more noise."""
    return _every_depth(tree, rng, lambda k: 1.0 / k, drawn=2)


def _every_depth(tree: DyadicTree, rng: random.Random, weight_of: Callable[[int], float], drawn: int) -> list[SubNetwork]:
    depths = range(1, tree.n_nodes)
    weights = {k: weight_of(k) / sum(map(weight_of, depths)) for k in depths}
    if len(depths) > 1 + drawn:
        chosen = sorted(rng.sample(depths[1:], drawn))
        weights = {1: weights[1], **{k: weights[k] * (len(depths) - 1) / drawn for k in chosen}}
    return [whole(tree.path_for_depth(k), weight) for k, weight in weights.items()]


#: name -> sub-networks of a step besides the main path; the weights of their exits sum to one ("few", and "octaves" and
#: "all" of a deep tree: on average).
MIXES: dict[str, Callable[[DyadicTree, random.Random], list[SubNetwork]]] = {
    "none": lambda tree, rng: [],
    "random": _random,  # any dyadic path, all alike
    "nested": _nested,  # a default path of a random depth
    "sandwich": _sandwich,  # the smallest and one default path
    "spine": _spine,  # the right spine, with an exit after each block
    "ladder": _ladder,  # the spine, with an exit after each block, and one default path that is deeper
    "prefixes": _prefixes,  # the full path, with exits at its dyadic prefixes
    "octaves": _octaves,  # every default path (six of them where there are more), the same weight for each octave of depth
    "all": _all,  # the same paths, weight by one over the depth
    "few": _few,  # the smallest and two other default paths, which stand for all others
}


#: did best of those above (docs/lab-log.md)
DEFAULT_MIX = "octaves"
#: total weight of a mix's exits beside the full path's 1, where nothing else is said; of the others it is 1.
MIX_WEIGHTS = {"octaves": 9.0, "all": 9.0, "few": 9.0}
#: mixes of short paths that branch off the full one; they belong with ``default_paths="prefix"`` and exit adapters
OF_PREFIXES = ("octaves", "all", "few")
#: mixes whose exits are at the ends of paths of ``default_paths="prefix"``
ON_PREFIXES = (*OF_PREFIXES, "prefixes")


def paths_of_mix(mix: str, tree: DyadicTree, path: tuple[int, ...]) -> str | tuple[tuple[int, ...], ...]:
    """Which paths a mix beside the main path trains, as :attr:`hbll_seq.models.config.HBLLConfig.trained_paths` says it."""
    spine = tree.right_spine
    if mix == "random":
        return "all"
    if mix in ("nested", "sandwich", "octaves", "all", "few") or mix == "ladder" and tree.family == "spine":
        return "default"
    deeper = [tree.path_for_depth(k) for k in range(tree.n_level + 1, tree.n_nodes)]
    others = {
        "none": [],
        "spine": [spine[: k + 1] for k in range(len(spine))],
        "ladder": [*(spine[: k + 1] for k in range(len(spine))), *deeper],
        "prefixes": [path[:n] for n in spine[:-1]],
    }[mix]
    return tuple(dict.fromkeys([*others, path]))


def sub_networks_of_step(mix: str, weight: float, tree: DyadicTree, path: tuple[int, ...], seed: int) -> list[SubNetwork]:
    """The main path with weight 1, then the mix's sub-networks with ``weight`` in all; a pure function of its arguments.

    Exits on the main path, or on a beginning of it, are joined to it, so that its blocks are evaluated once.
    """
    main, others = whole(path), []
    for network in MIXES[mix](tree, random.Random(seed)):
        exits = {n: weight * w for n, w in network.exits.items()}
        if network.path == path[: len(network.path)]:
            joined = {n: main.exits.get(n, 0.0) + w for n, w in exits.items()}
            main = SubNetwork(path, {**main.exits, **joined})
        else:
            others.append(SubNetwork(network.path, exits))
    return [main, *others]
