"""Topology: nodes, arcs, paths, and the errors for what is none."""

import random
from collections import Counter

import pytest

from hbll_seq.tree.topology import DyadicTree


def test_levels_and_parents_of_eight_transitions():
    tree = DyadicTree(3)
    assert (tree.N, tree.n_nodes) == (8, 7)
    assert tree.levels == ((4,), (2, 6), (1, 3, 5, 7))
    assert {n: tree.parents(n) for n in range(1, 8)} == {
        4: (0, 8), 2: (0, 4), 6: (4, 8), 1: (0, 2), 3: (2, 4), 5: (4, 6), 7: (6, 8),
    }  # fmt: skip


@pytest.mark.parametrize("n_level", range(1, 9))
def test_every_node_needs_only_levels_above_its_own(n_level):
    tree = DyadicTree(n_level)
    ready = {0, tree.N}
    for t, level in enumerate(tree.levels):
        assert len(level) == 2**t
        for n in level:
            assert set(tree.parents(n)) <= ready
            assert tree.level_of(n) == t
        ready |= set(level)
    assert ready == set(range(tree.N + 1))


def test_arcs_are_the_dyadic_intervals():
    tree = DyadicTree(3)
    assert len(tree.arcs()) == len(set(tree.arcs())) == 2 * 8 - 1
    assert set(tree.arcs()) == {(i, j) for i in range(9) for j in range(9) if tree.is_arc(i, j)}
    assert tree.is_arc(4, 6) and not tree.is_arc(2, 6) and not tree.is_arc(3, 5) and not tree.is_arc(0, 3)


def brute_force_paths(tree):
    """All ways to walk 0 -> N over arcs, by depth-first search over is_arc."""
    found, stack = set(), [(0,)]
    while stack:
        walk = stack.pop()
        if walk[-1] == tree.N:
            found.add(walk[1:-1])
            continue
        stack += [(*walk, j) for j in range(walk[-1] + 1, tree.N + 1) if tree.is_arc(walk[-1], j)]
    return found - {()}


@pytest.mark.parametrize("n_level", [1, 2, 3, 4])
def test_paths_are_all_walks_over_arcs(n_level):
    tree = DyadicTree(n_level)
    assert set(tree.paths()) == brute_force_paths(tree)
    assert len(tree.paths()) == tree.n_paths == [1, 4, 25, 676][n_level - 1]
    assert all(tree.validate_path(path) == path for path in tree.paths())


def test_counting_does_not_list():
    assert DyadicTree(6).n_paths == 210_066_388_900
    with pytest.raises(ValueError, match="210,066,388,900 paths.*sample_path"):
        DyadicTree(6).paths()


def test_sampled_paths_are_uniform_and_valid():
    tree, rng = DyadicTree(2), random.Random(0)
    counts = Counter(tree.sample_path(rng) for _ in range(4000))
    assert set(counts) == set(tree.paths())
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations are 110
    deep = DyadicTree(6)
    assert all(deep.validate_path(deep.sample_path(rng)) for _ in range(20))


def test_path_for_depth():
    tree = DyadicTree(3)
    assert [tree.path_for_depth(k) for k in range(1, 8)] == [
        (4,), (4, 6), (4, 6, 7), (4, 5, 6, 7), (2, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7),
    ]  # fmt: skip
    for n_level in range(1, 8):
        tree = DyadicTree(n_level)
        paths = [tree.path_for_depth(k) for k in range(1, tree.n_nodes + 1)]
        assert [len(path) for path in paths] == list(range(1, tree.N))
        assert all(tree.validate_path(path) for path in paths)
        assert all(set(a) < set(b) for a, b in zip(paths, paths[1:]))


def test_prefix_paths_leave_the_full_one_last():
    tree = DyadicTree(3, "prefix")
    assert [tree.path_for_depth(k) for k in range(1, 8)] == [
        (4,), (2, 4), (1, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4, 6), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6, 7),
    ]  # fmt: skip
    for n_level in range(1, 8):
        tree = DyadicTree(n_level, "prefix")
        for depth in range(1, tree.N):
            path = tree.validate_path(tree.path_for_depth(depth))
            shared = sum(n == i for i, n in enumerate(path, start=1))
            assert len(path) == depth and depth - shared <= n_level
            if n_level <= 4:
                assert path == min(p for p in tree.paths() if len(p) == depth)
    with pytest.raises(ValueError, match="family='left'.*spine, prefix"):
        DyadicTree(3, "left")


@pytest.mark.parametrize("depth", [0, 8, -1, "x", 2.0, True, None])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match="1 to 7 blocks"):
        DyadicTree(3).path_for_depth(depth)


@pytest.mark.parametrize("path", [(), (8,), (0, 4), ("4",), 3.5, "47", (True,)])
def test_paths_that_are_no_block_numbers(path):
    with pytest.raises(ValueError, match="block numbers 1 to 7"):
        DyadicTree(3).validate_path(path)


@pytest.mark.parametrize(
    "path, step",
    [((2, 6), "2 -> 6"), ((6,), "0 -> 6"), ((3, 4), "0 -> 3"), ((1,), "1 -> 8")],
)
def test_paths_that_are_not_dyadic(path, step):
    with pytest.raises(ValueError, match=step + " is not a dyadic interval.*the next block can be"):
        DyadicTree(3).validate_path(path)


@pytest.mark.parametrize(
    "path, message",
    [((1, 9), r"path=\[1, 9\]: 9 is none of the block numbers 1 to 7"),
     ((4, 2, 1), r"path=\[4, 2, 1\]: 2 comes after 4.*ascending order; give \[1, 2, 4\]"),
     ((4, 4), r"4 comes after 4.*ascending order; give \[4\]"), ((6, 3), r"3 comes after 6.*give one such as \[4, 6\]")],
)  # fmt: skip
def test_numbers_that_are_none_or_in_disorder(path, message):
    with pytest.raises(ValueError, match=message):
        DyadicTree(3).validate_path(path)


def test_path_that_ends_too_early():
    with pytest.raises(ValueError, match="5 -> 8 is not.*from 5 the next block can be"):
        DyadicTree(3).validate_path((4, 5))


@pytest.mark.parametrize("n_level", [0, -1, 1.5, "3", True])
def test_bad_n_level(n_level):
    with pytest.raises(ValueError, match="n_level"):
        DyadicTree(n_level)
