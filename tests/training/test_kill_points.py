"""Nothing is lost by a kill: points over all operations (tests/kill_points.py), and the harness itself can fail."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness reads /proc")

#: workers that write a file in every way; prints what the kills leave of it.
WAYS = """
import json, os, sys
from pathlib import Path
from kill_watch import Point, Worker, intercept
import safetensors.torch, torch

def write(name, flushed):
    with open(name, "ab", buffering=0) as file:
        file.write(b"x" * 100)
        if flushed:
            os.fsync(file.fileno())

def act():
    write("plain", False)                                               # 1
    write("flushed", True)                                              # 2, 3
    write("flushed", False)                                             # 4
    os.replace("plain", "renamed")                                      # 5
    safetensors.torch.save_file({"a": torch.zeros(100)}, "weights")     # 6
    Path("folder").mkdir()                                              # 7
    handle = os.open("folder", os.O_RDONLY)
    write(os.path.join("folder", "last"), False)                        # 8
    os.unlink("last", dir_fd=handle)                                    # 9

intercept()
found = {}
for text in [None, *sys.argv[1:]]:
    root = Path(f"root-{text}", "root").absolute()
    root.mkdir(parents=True)
    ended = Worker(act, root, text and Point.parse(text)).wait()
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in sorted(root.rglob("*")) if path.is_file()}
    found[text or "whole"] = [ended.code, len(ended.labels), sizes]
print(json.dumps(found))
"""


def _python(*arguments, **keywords):
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, **keywords)


def _campaign(folder, *options, timeout):
    ended = _python(TESTS / "kill_points.py", "--json", folder / "found.json", *options, timeout=timeout,
                    cwd=TESTS.parent)
    print(ended.stdout)
    assert (folder / "found.json").exists(), ended.stdout + ended.stderr
    found = json.loads((folder / "found.json").read_text())
    assert ended.returncode == int(bool(found["findings"]))
    careless = [finding for finding in found["findings"] if finding["scenario"] == "broken save"]
    return found["points"], careless, [finding for finding in found["findings"] if finding not in careless]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """About 30 points beside the careless ones; what resume and export do is part of training and of winding back."""
    parts = ["training", "winding back", "overwriting", "two runs", "save", "cache", "lines"]
    options = [word for part in parts for word in ("--scenario", part)]
    return _campaign(tmp_path_factory.mktemp("kills"), "--points", "33", *options, timeout=300)


def test_every_kill_leaves_the_unbroken_result_or_what_was_there(campaign):
    points, _, findings = campaign
    assert points >= 30 and findings == []


def test_a_careless_save_is_found(campaign):
    _, careless, _ = campaign
    assert any(finding["found"].startswith("mixture") for finding in careless)


def test_kills_take_place_where_they_are_meant_to(tmp_path):
    ended = _python("-c", WAYS, "half:1", "before:2", "power:5", "before:6", "half:6", "power:7", "half:8", "before:9",
                    cwd=tmp_path, timeout=100)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    code, n_operations, whole = found.pop("whole")
    assert (code, n_operations) == (0, 9) and {code for code, *_ in found.values()} == {-signal.SIGKILL}
    weights = whole.pop("weights")
    assert whole == {"flushed": 200, "renamed": 100}
    assert {point: sizes for point, (_, _, sizes) in found.items()} == {
        "half:1": {"plain": 50},
        "before:2": {"plain": 100},
        "power:5": {"flushed": 100, "plain": 0},
        "before:6": {"flushed": 200, "renamed": 100},
        "half:6": {".tmpHaLf00": weights // 2, "flushed": 200, "renamed": 100},
        "power:7": {"flushed": 100, "renamed": 0, "weights": 0},
        "half:8": {"flushed": 200, "folder/last": 50, "renamed": 100, "weights": weights},
        "before:9": {"flushed": 200, "folder/last": 100, "renamed": 100, "weights": weights},
    }


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    points, _, findings = _campaign(tmp_path, "--points", "150", "--seed", "1", timeout=1800)
    assert points >= 140 and findings == []
