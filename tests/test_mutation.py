"""The mutation checker: what it changes, what it leaves alone, and that it sees which tests fail."""

import ast
import json
import os
import subprocess
import sys

from mutation.__main__ import drawn, known
from mutation.mutants import mutants_of
from mutation.targets import PACKAGE, ROOT, TESTS, files_of, modules_of

SOURCE = '''"""é: a docstring with 1 < 2."""
def f(x: int = 3) -> "int | 4":
    if x < 1 and x:
        raise ValueError(f"x={x + 1} of {5}")
    x.norm = g(x.detach(), 7, axis=True).sum()
    with torch.no_grad():
        return x.norm - 2
'''
EXPECTED = {
    "constant": {("3", "4"), ("1", "2"), ("7", "8"), ("True", "False"), ("2", "3")},
    "comparison": {("x < 1", "(x <= 1)"), ("x < 1", "(x >= 1)")},
    "operator": {("x < 1 and x", "(x < 1 or x)"), ("x.norm - 2", "(x.norm + 2)")},
    "condition": {("x < 1 and x", "not (x < 1 and x)")},
    "statement": {('raise ValueError(f"x={x + 1} of {5}")', "pass"),
                  ("x.norm = g(x.detach(), 7, axis=True).sum()", "pass")},
    "argument": {("g(x.detach(), 7, axis=True)", "g(x.detach(), 7)"),
                 ("g(x.detach(), 7, axis=True)", "g(x.detach(), axis=True)")},
    "call dropped": {("x.detach()", "x")},
    "name": {("g(x.detach(), 7, axis=True).sum()", "g(x.detach(), 7, axis=True).mean()"),
             ("torch.no_grad()", "torch.enable_grad()")},
    "return": {("return x.norm - 2", "return None")},
}  # fmt: skip


def test_the_mutants_of_a_text_are_these():
    found = mutants_of(SOURCE)
    assert {kind: {(m.before, m.after) for m in found if m.kind == kind} for kind in EXPECTED} == EXPECTED
    assert len(found) == sum(map(len, EXPECTED.values()))
    for mutant in found:
        changed = mutant.apply(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE)) and len(changed) - len(SOURCE) == (
            len(mutant.after) - len(mutant.before))  # fmt: skip


def test_every_module_has_tests_and_mutants_that_are_programs():
    for folder in {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/*.py")}:
        for module in modules_of(folder):
            assert all((ROOT / name).exists() for name in files_of(module))
    assert all((PACKAGE / name).exists() for name in TESTS)
    for path, mutant in drawn(["engine", "objectives", "data"], 60, seed=1):
        ast.parse(mutant.apply(path.read_text()))


PROGRAM = """
import json, sys
from pathlib import Path
from tests.mutation import __main__ as checker
folder = Path(sys.argv[1])
checker.ROOT, checker.files_of = folder / "own", lambda path: ["test_it.py"]
module, trial = folder / "own" / "it.py", checker.Trial(folder / "copy", None)
for mutant in checker.mutants_of(module.read_text()):
    print(json.dumps([mutant.line, mutant.kind, trial(module, mutant)]))
"""


def test_a_trial_says_which_test_fails_and_that_none_does(tmp_path):
    for name in ("own", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "it.py").write_text("def half(x):\n    return x / 2\n\n\ndef unseen(x):\n    return x + x\n")
    test = "from it import half\ndef test_half(): assert half(4) == 2\ndef test_zero(): assert half(0) == 0\n"
    (tmp_path / "copy" / "test_it.py").write_text(test)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    by = "test_it.py::test_half"
    assert [(line, kind, row["outcome"], row["by"]) for line, kind, row in rows] == [
        (2, "return", "killed", by), (2, "operator", "killed", by), (2, "constant", "killed", by),
        (6, "return", "survived", None), (6, "operator", "survived", None)]  # fmt: skip
    assert "x / 2" in (tmp_path / "copy" / "it.py").read_text()  # the copy is as it was


def test_a_result_cut_off_by_a_kill_is_left_out(tmp_path):
    results = tmp_path / "results.jsonl"
    assert known(results) == {}
    results.write_text('{"key": "a"}\n{"key": "b", "outc')
    assert known(results) == {"a": {"key": "a"}}
