"""Settings of a run whose blocks are spread over ranks: what cannot be is refused by name, with a remedy that works."""

import pytest

from hbll_seq.training.presets import PRESETS, read_preset, resolve


def made(**values):
    return resolve({"max_steps": 5, "block_parallel": 2}, values)


@pytest.mark.parametrize("values", [
    {}, {"chunk_size": 1, "block_parallel": 7}, {"linearization": "zero"}, {"path": "4,6,7", "chunk_size": 2},
    {"cell": "gru", "carry_state": True}, {"depth_mix": "octaves", "forward": 1, "backward": 1},
    {"depth_mix": "none", "default_paths": "spine"}, {"n_level": 1, "block_parallel": 1}, {"chunk_size": 4},
    {"chunk_size": 2, "block_shares": "1,3"}, {"chunk_size": 2, "block_shares": [3, 1]},
])  # fmt: skip
def test_what_can_be_spread(values):
    settings = made(**values)
    assert settings.resolved().resolved() == settings.resolved()
    assert settings.resolved().block_parallel == values.get("block_parallel", 2)


@pytest.mark.parametrize("values, named, remedy", [
    ({"objective": "tree"}, "objective='tree'", {"objective": "sweeps"}),
    ({"objective": "backprop"}, "objective='backprop'", {"objective": "sweeps"}),
    ({"linearization": "low_rank"}, "linearization='low_rank'", {"linearization": "zero"}),
    ({"depth_mix": "none", "forward": 1, "backward": 1}, "linearization='low_rank'", {"linearization": "identity"}),
    ({"control": "adaptive"}, "control='adaptive'", {"control": "none"}),
    ({"init": "tree"}, "init='tree'", {"init": "first"}),
    ({"default_paths": "spine", "depth_mix": "octaves"}, "default_paths='spine' and depth_mix='octaves'",
     {"default_paths": "prefix"}),
    ({"depth_mix": "ladder"}, "default_paths='spine' and depth_mix='ladder'", {"depth_mix": "none"}),
    ({"block_parallel": 4}, "chunk_size=4", {"chunk_size": 2}),
    ({"path": "4,6,7", "block_parallel": 2}, "chunk_size=4", {"chunk_size": 2}),
    ({"n_level": 1, "chunk_size": 1}, "chunk_size=1", {"n_level": 2}),
])  # fmt: skip
def test_what_cannot_be_spread_is_refused(values, named, remedy):
    with pytest.raises(ValueError) as error:
        made(**values)
    n_ranks = values.get("block_parallel", 2)
    assert f"block_parallel={n_ranks} with {named}" in str(error.value) and "--block-parallel" in str(error.value)
    made(**{**values, **remedy})
    made(**{**values, "block_parallel": 1})


@pytest.mark.parametrize("values, words", [
    ({"block_shares": "1,3"}, "must be 2 numbers of at least 1 that add up to the 2 segments"),
    ({"block_shares": "1,1", "block_parallel": 1}, "block_shares='1,1' with block_parallel=1: one rank holds all segments"),
    ({"block_shares": "1,x"}, "block_shares='1,x': must be numbers such as 1,3"),
    ({"block_shares": 2}, "block_shares='2' with block_parallel=2: must be 2 numbers"),
])  # fmt: skip
def test_shares_that_do_not_fit_are_refused(values, words):
    with pytest.raises(ValueError) as error:
        made(**values)
    assert words in str(error.value)
    made(**{**values, "block_shares": None})


AHEAD = {"ahead": True, "chunk_size": 4, "forward": 1, "backward": 0, "linearization": "zero"}


@pytest.mark.parametrize("values, named, remedy", [
    ({"linearization": "identity"}, "linearization='identity'", {"linearization": "zero"}),
    ({"backward": 1}, "backward=1", {"backward": 0}),
    ({"forward": 0}, "forward=0", {"forward": 1}),
    ({"chunk_size": 1, "forward": 6}, "chunk_size=1", {"chunk_size": 4, "forward": 1}),
    ({"chunk_size": 3, "forward": 2}, "block 3", {"chunk_size": 4, "forward": 1}),
    ({"n_level": 5, "chunk_size": 8, "forward": 3, "block_parallel": 4}, "block 8",
     {"block_parallel": 2, "chunk_size": 16, "forward": 1}),
    ({"depth_mix": "none"}, "depth_mix='none'", {"depth_mix": "octaves"}),
    ({"path": "1,2,3,4,5,6"}, "depth_mix='none'", {"path": "full"}),
    ({"cell": "gru"}, "cell='gru'", {"cell": "transformer"}),
    ({"block_shares": "1,1"}, "block_shares='1,1'", {"block_shares": "none"}),
])  # fmt: skip
def test_what_cannot_work_ahead_is_refused(values, named, remedy):
    """The remedy that is told works."""
    with pytest.raises(ValueError) as error:
        made(**{**AHEAD, **values})
    said = str(error.value)
    assert "ahead=True" in said and named in said and said.endswith("or --no-ahead")
    for name, value in remedy.items():
        assert f"--{name.replace('_', '-')} {value}" in said
    assert made(**{**AHEAD, **values, **remedy}).resolved().ahead
    made(**{**AHEAD, **values, "ahead": False})


def test_one_rank_has_nobody_to_be_ahead_of():
    with pytest.raises(ValueError, match="ahead=True with block_parallel=1: .*give --block-parallel 2, or --no-ahead"):
        made(**AHEAD, block_parallel=1)


@pytest.mark.parametrize("preset", ["small", "bundled"])
@pytest.mark.parametrize("n_level, segments", [(3, 2), (4, 4), (5, 8)])
def test_presets_are_exact_at_every_depth(preset, n_level, segments):
    """They name no K and M: what is enough for seven blocks would be an approximation of fifteen."""
    settings = resolve(read_preset(preset, PRESETS), {"n_level": n_level, "block_parallel": 2}).resolved()
    assert (settings.forward, settings.backward, settings.chunk_size) == (segments - 1, segments - 1, 4)
    assert settings.linearization == "identity"
