"""Which depths a mix draws: all that it is said to, and no others."""

import pytest

from hbll_seq.objectives.depth_mix import sub_networks_of_step
from hbll_seq.tree.topology import DyadicTree


@pytest.mark.parametrize("n_level", [3, 4])
@pytest.mark.parametrize("mix, smallest", [("nested", lambda n_level: 1), ("sandwich", lambda n_level: 1),
                                           ("ladder", lambda n_level: n_level + 1)])  # fmt: skip
def test_a_drawn_depth_is_any_between_the_mixs_smallest_and_the_full_path(mix, smallest, n_level):
    tree = DyadicTree(n_level)
    full, found = tuple(range(1, tree.N)), set()
    for seed in range(400):
        drawn = sub_networks_of_step(mix, 1.0, tree, full, seed)[-1]  # the main path, a fixed one, the drawn one
        assert drawn.path == tree.path_for_depth(len(drawn.path))
        found.add(len(drawn.path))
    assert found == set(range(smallest(n_level), tree.n_nodes))


def test_a_ladder_of_a_small_tree_is_its_spine():
    tree = DyadicTree(2)
    main, spine = sub_networks_of_step("ladder", 1.0, tree, (1, 2, 3), 0)
    assert (main.path, main.exits, spine.path, spine.exits) == ((1, 2, 3), {3: 1.0}, (2, 3), {2: 0.5, 3: 0.5})
