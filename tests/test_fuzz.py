"""The fuzz harness finds nothing in the library, and everything where a rule is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.oracle import fault_of_message
from fuzz.violations import VIOLATIONS

ROOT = Path(__file__).resolve().parents[1]


def harness(report: Path, *options: str, timeout: float) -> dict:
    """Its report, from a process of its own: workers are forked, and this process has threads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    ran = subprocess.run([sys.executable, "-m", "tests.fuzz", "--report", str(report), *options], cwd=ROOT, env=environment,
                         capture_output=True, text=True, timeout=timeout)  # fmt: skip
    assert report.exists(), ran.stderr[-3000:]
    print(ran.stdout)
    return json.loads(report.read_text())


def check(report: dict, count: int) -> None:
    """As many inputs as were asked for, none of them a finding; targets of many inputs met refusals and good endings."""
    assert sum(sum(counts.values()) for counts in report["counts"].values()) == count
    for finding in report["findings"]:
        print(json.dumps(finding)[:900])
    assert report["findings"] == []
    for target, counts in report["counts"].items():
        if sum(counts.values()) >= 50:
            assert counts.get("refused") and (counts.get("equal") or counts.get("accepted")), (target, counts)


def test_2000_hostile_inputs_are_refused_or_harmless(tmp_path):
    check(harness(tmp_path / "report.json", "--count", "2000", timeout=300), 2000)


@pytest.mark.slow
def test_50000_hostile_inputs_are_refused_or_harmless(tmp_path):
    workers = str(min(4, len(os.sched_getaffinity(0))))
    check(harness(tmp_path / "report.json", "--count", "50000", "--workers", workers, timeout=3600), 50_000)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Name of each broken target -> class of the finding, None where there was none."""
    targets = [part for name in VIOLATIONS for part in ("--target", f"broken:{name}")]
    report = harness(tmp_path_factory.mktemp("broken") / "report.json", *targets, "--seed", "0", "--timeout", "1.5",
                     "--memory", "200", "--workers", "2", timeout=120)  # fmt: skip
    found = {finding["target"].removeprefix("broken:"): finding for finding in report["findings"]}
    return {name: found.get(name, {}).get("kind") for name in VIOLATIONS}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_harness_sees_every_violation(seen, name):
    assert seen[name] == VIOLATIONS[name][1]


def test_an_input_is_a_function_of_its_target_and_seed(tmp_path):
    """The same seeds twice, in other company: the same inputs, so that a finding can be seen again."""
    options = ("--target", "broken:describes")
    one = harness(tmp_path / "one.json", *options, "--count", "3", timeout=60)["findings"]
    alone = harness(tmp_path / "alone.json", *options, "--seed", "2", timeout=60)["findings"]
    assert [finding["seed"] for finding in one] == [0, 1, 2] and len({finding["what"] for finding in one}) == 3
    assert alone[0]["what"] == one[2]["what"]


@pytest.mark.parametrize("message, names, fault", [
    ("n_embd=3: must be even", ("n_embd",), ""),
    ("n_embd=3: must be even", ("n_head",), "names nothing"),
    ("n_embd=3 is odd", ("n_embd",), "without remedy"),
    ("must\rbe", (), "of several lines"),
])
def test_messages_are_judged(message, names, fault):
    assert fault_of_message(message, names) == fault
