"""Every script of ``train/experiments`` tells a mistake in one line and ends with the code of its kind."""

import os
from pathlib import Path

import pytest
from forked import Forked

from comparisons.program import as_program

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "train" / "experiments").glob("*.py"))


def said_by(script, *argv):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}
    process = Forked([str(script), *argv], environment, stderr=-1)
    try:
        return process.communicate(120)[1].decode(), process.wait(10)
    finally:
        process.kill()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(script):
    said, code = said_by(script, "--outptu", "x.json")
    assert code == 2 and said.count("\n") == 1
    assert said == f"error: unrecognized arguments: --outptu x.json; did you mean --output? (see {script.name} --help)\n"


def test_a_wrong_value_is_one_line():
    said, code = said_by(ROOT / "train" / "experiments" / "compare.py", "--n-level", "0")
    assert code == 2 and said.startswith("error: n_level=0: must be") and said.count("\n") == 1


@pytest.mark.parametrize("error,code", [(None, 0), (ValueError("no"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(error, code):
    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as ended:
        as_program(main)
    assert ended.value.code == code
