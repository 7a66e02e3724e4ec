"""Which tests are asked about which module, nearest first: the first failure ends a mutant's run."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hbll_seq"

#: of a folder or a module of the package (the longest name that fits counts)
TESTS = {
    "engine": ("engine/test_engine.py", "engine", "chains/test_time_sweeps.py", "objectives/test_objective.py", "chains",
               "distributed"),
    "engine/scan.py": ("engine/test_scan.py", "tree", "engine", "chains"),
    "engine/linearization/base.py": ("engine/test_engine.py", "engine", "chains/test_time_sweeps.py"),
    "engine/linearization": ("engine/test_secants.py", "chains/test_time_secants.py", "engine", "chains"),
    "distributed": ("distributed", "training/test_lm_ranks.py"),
    "tree": ("tree", "objectives/test_objective.py", "engine/test_sweeps.py"),
    "chains": ("chains", "engine/test_engine.py", "engine/test_sweeps.py", "objectives/test_objective.py"),
    "chains/time.py": ("engine/test_engine.py", "chains/test_time_sweeps.py", "chains/test_time_secants.py", "chains"),
    "chains/depth.py": ("objectives/test_objective.py", "engine", "chains/test_grid.py"),
    "layers": ("layers", "models/test_model.py", "models/test_padding.py", "chains/test_time_sweeps.py"),
    "data": ("data",),
    "data/windows.py": ("data/test_data_arguments.py", "data/test_data.py", "data/test_file_tokens.py", "data"),
    "generation": ("generation",),
    "generation/text.py": ("generation/test_generation_door.py", "generation"),
    "models": ("models", "generation"),
    "objectives": ("objectives/test_objective_door.py", "objectives/test_objective.py", "engine/test_sweeps.py",
                   "objectives", "chains"),
    "objectives/options.py": ("objectives/test_options.py", "objectives", "engine/test_sweeps.py", "chains"),
    "objectives/registry.py": ("objectives/test_options.py", "objectives", "engine/test_sweeps.py", "chains"),
    "objectives/sweeps.py": ("engine/test_sweeps.py", "engine/test_engine.py", "objectives", "chains", "distributed"),
    "objectives/depth_mix.py": ("engine/test_sweeps.py", "objectives", "chains"),
    "objectives/branches.py": ("engine/test_sweeps.py", "distributed/test_spread_blocks.py", "objectives", "chains"),
    "objectives/tree.py": ("models/test_exits.py", "tree", "objectives/test_objective.py", "objectives"),
    "objectives/recurrent.py": ("objectives/test_recurrent_baselines.py", "chains", "objectives"),
    "objectives/recurrent_base.py": ("models/test_padding.py", "objectives/test_recurrent_baselines.py", "chains",
                                     "objectives"),
    "evaluation": ("evaluation", "objectives/test_objective.py"),
    "training": ("training",),
    "training/share.py": ("training/test_lm_ranks.py", "training"),
    "training/trainer.py": ("training/test_trainer.py", "training/test_lm_script.py", "training/test_lm_resume.py",
                            "training/test_lm_grid.py", "training/test_lm_signals.py", "training"),
    "training/checkpoint.py": ("training/test_checkpoint.py", "training/test_checkpoint_faults.py", "training"),
    "cli": ("cli",),
    "integrations": ("integrations", "evaluation"),
    "utils": ("utils", "data", "models"),
}  # fmt: skip


def modules_of(target: str) -> list[Path]:
    """The modules of a folder or file of the package, as ``engine`` or ``training/trainer.py``."""
    path = PACKAGE / target
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    if not found:
        raise SystemExit(f"--targets {target}: no module of hbll_seq; give a folder (engine) or a file (training/trainer.py)")
    return found


def files_of(module: Path) -> list[str]:
    """Test files and folders for a module, relative to the repository."""
    name = module.relative_to(PACKAGE).as_posix()
    fitting = [key for key in TESTS if name == key or name.startswith(key + "/")]
    if not fitting:
        raise SystemExit(f"{name}: tests/mutation/targets.py names no tests for it; add them to TESTS")
    return list(dict.fromkeys(f"tests/{path}" for path in TESTS[max(fitting, key=len)]))
