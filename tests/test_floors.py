"""The house stands: no circle of imports, and no arrow from a lower floor to a higher one (docs/architecture.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hbll_seq"
#: from the ground up; a module may import from its own floor and from those below
FLOORS = (
    "utils", "engine", "distributed", "tree", "layers", "chains", "data", "generation", "models", "objectives", "evaluation",
    "training", "integrations", "cli",
)  # fmt: skip
#: the package itself, and what ``python -m`` runs
ON_TOP = {"hbll_seq", "hbll_seq.__main__"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name, text):
    """Every module of the library that a module imports: late and TYPE_CHECKING imports included."""
    package = name if MODULES.get(name, Path("x.py")).name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "hbll_seq"}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == "hbll_seq":
                found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return found - {name}


def graph():
    return {name: imports_of(name, path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def floor_of(name):
    return FLOORS.index(name.split(".")[1]) if "." in name and name not in ON_TOP else len(FLOORS)


def upward(arrows):
    return sorted((a, b) for a, targets in arrows.items() for b in targets if floor_of(b) > floor_of(a))


def circles(arrows):
    """One circle for every arrow back to a module that is being walked."""
    found, done = [], set()

    def visit(name, walked):
        if name in walked:
            found.append([*walked[walked.index(name) :], name])
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, [*walked, name])
            done.add(name)

    for name in sorted(arrows):
        visit(name, [])
    return found


def test_every_module_stands_on_a_floor():
    assert {name.split(".")[1] for name in MODULES.keys() - ON_TOP} == set(FLOORS)


def test_no_import_leads_to_a_higher_floor():
    assert upward(graph()) == []


def test_no_circle_of_imports():
    assert circles(graph()) == []


def test_late_and_hidden_imports_are_seen():
    late = "def f():\n    from hbll_seq.models import hub\n    import hbll_seq.training.trainer\n"
    hidden = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models.config import HBLLConfig\n"
    assert imports_of("hbll_seq.utils.seeds", late) == {"hbll_seq.models.hub", "hbll_seq.training.trainer"}
    assert imports_of("hbll_seq.utils.seeds", hidden) == {"hbll_seq.models.config"}
    assert upward({"hbll_seq.utils.seeds": {"hbll_seq.models.hub"}}) == [("hbll_seq.utils.seeds", "hbll_seq.models.hub")]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
