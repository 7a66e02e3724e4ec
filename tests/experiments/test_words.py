"""Old words of stored results are read as today's, and today's as they are."""

import json

import pytest

from comparisons.depth_methods import DepthMethod
from comparisons.results import Results
from comparisons.time_methods import TimeMethod
from comparisons.words import current_description, current_name, current_run, current_setting


@pytest.mark.parametrize(
    "over, old, new",
    [
        ("depth", "backprop-7", "backprop-7"),
        ("depth", "sweeps", "sweeps"),
        ("depth", "sweeps:sweeps=2,corrections=3,mix=all", "sweeps:forward=2,backward=3,depth_mix=all"),
        ("depth", "sweeps:linearization=secant,secant_rank=4", "sweeps:linearization=low_rank,rank=4"),
        ("depth", "backprop:mix=all,mix_weight=2,graphs=recomputed",
         "backprop:depth_mix=all,depth_mix_weight=2,recompute=true"),
        ("depth", "sweeps:readout_rank=32,readouts=depth,paths=prefix", "sweeps:exit_rank=32,exit_by=depth,paths=prefix"),
        ("depth", "sweeps:time_sweeps=0,time_corrections=2,time_chunk=4,chunk=2",
         "sweeps:time_forward=0,time_backward=2,time_chunk_size=4,chunk_size=2"),
        ("depth", "multigrid:sweeps=2,corrections=1", "v_cycles:cycles=2,backward=1"),
        ("time", "sweeps:sweeps=4,corrections=3,chunk=2,linearization=secant",
         "sweeps:forward=4,backward=3,chunk_size=2,linearization=shared_matrix"),
        ("time", "tree:sweeps=4", "tree:consistency=4"),
        ("time", "tree+sweeps:sweeps=1", "sweeps:init=tree,forward=1"),
        ("time", "paper:sweeps=0", "tree:consistency=0"),
    ],
)  # fmt: skip
def test_names(over, old, new):
    assert current_name(old, over) == new == current_name(new, over)
    method = (DepthMethod if over == "depth" else TimeMethod).named(old)
    assert method.name == new and method.description == type(method).named(new).description


def test_descriptions_are_translated_whatever_their_order():
    old = "tree {'sweeps': 4, 'arc_weight': 0.1}"
    assert current_description(old, "time") == "tree {'arc_weight': 0.1, 'consistency': 4}"
    limitless = TimeMethod.named("sweeps:clip=inf").description
    assert "inf" in limitless and current_description(limitless, "time") == limitless
    assert current_description("K = 3", "time") == "K = 3"


def test_runs_and_settings():
    old = {"side": "sweeps", "method": "sweeps {'sweeps': 1}", "probes": [[1, 1.0]], "lr": 1.0, "seed": 0}
    new = {"method": "sweeps", "description": "sweeps {'forward': 1}", "alignment": [[1, 1.0]], "lr": 1.0, "seed": 0}
    assert current_run(old, "time") == new == current_run(new, "time")
    setting = current_setting({"mix": "all", "block_size": 8, "probe_every": 2, "text": "induction [('block_size', 64)]"})
    assert setting == {"depth_mix": "all", "context_length": 8, "alignment_every": 2,
                       "text": "induction [('context_length', 64)]"} == current_setting(setting)  # fmt: skip


def test_an_old_file_is_left_alone_until_a_run_is_added(tmp_path):
    path = tmp_path / "r.json"
    run = {"side": "sweeps:sweeps=2", "method": "sweeps {'sweeps': 2}", "lr": 1.0, "seed": 0, "probes": []}
    path.write_text(json.dumps({"setting": {"mix": "all"}, "runs": [run]}))
    before = path.read_bytes()
    results = Results(path, {"depth_mix": "all"}, "depth")
    found = results.find("sweeps:forward=2", 1.0, 0, "sweeps {'forward': 2}")
    assert found["alignment"] == [] and results.methods() == ["sweeps:forward=2"] and path.read_bytes() == before
    results.add({"method": "tree", "description": "tree {}", "lr": 1.0, "seed": 0})
    again = Results(path, {"depth_mix": "all"}, "depth")
    assert again.methods() == ["sweeps:forward=2", "tree"] and again.runs[0] == found


def test_every_stored_file_is_read_by_its_old_words(stored_results):
    """The words of the files are those of the table: nothing of them is left after reading."""
    left = set()
    for path in sorted(stored_results.glob("*.json")):
        data = json.loads(path.read_text())
        if "runs" in data:
            over = "depth" if "n_level" in data["setting"] else "time"
            words = str([(run["method"], run["description"]) for run in (current_run(r, over) for r in data["runs"])])
            old = ("sweeps=", "sweeps':", "corrections", "secant", "chunk=", "chunk'", "readout", "mix='", "'mix':")
            left |= {word for word in old if word in words}
    assert left == set()
