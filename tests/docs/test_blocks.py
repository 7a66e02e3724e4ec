"""Every Python block and every command of README and docs is tried here; a new one that nobody placed fails.

Python blocks run in order, page by page, in one folder that holds the model ``runs/lm``. That model is made by the
README's training command, shortened. Of the other commands the options are read by the script's own parser.
"""

import contextlib
import importlib.util
import io
import os
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks, inline_commands, named, shell_commands

import hbll_seq
from hbll_seq import cli
from hbll_seq.cli.program import COMMANDS

#: pages whose Python blocks need an extra: tests/integrations/test_page.py runs them
ELSEWHERE = {"integrations.md"}
#: what makes a training run of seconds of any of them
SHORT = "--preset debug --data my.txt --cache-dir cache --threads 1 --max-steps 2 --sample-tokens 0 --eval-every 0"
#: commands that are really run: what is run in their place
RUN = {
    "accelerate launch train/lm.py": f"python train/lm.py {SHORT} --n-level 3 --output-dir runs/lm",
    "python train/lm.py --data my.txt --output-dir runs/mine": f"python train/lm.py {SHORT} --output-dir runs/mine",
    "python train/lm.py --preset hybrid-small --output-dir runs/hybrid":
        f"python train/lm.py {SHORT} --cell mingru,transformer,mingru --output-dir runs/hybrid",
    "accelerate launch train/lm.py --resume --output-dir runs/mine": "python train/lm.py --resume --output-dir runs/mine",
    "accelerate launch train/lm.py --extend 2000 --output-dir runs/mine":
        "python train/lm.py --extend 2 --output-dir runs/mine",
    "accelerate launch train/lm.py --init-from runs/mine --data my.txt --output-dir runs/next":
        f"python train/lm.py {SHORT} --init-from runs/mine --output-dir runs/next",
    **{command: command for command in (
        "hbll-seq --help",
        "hbll-seq generate --help",
        'hbll-seq generate "The history of the city" --depth 3',
        'hbll-seq generate "The history of the city" --model runs/lm --depth 3',
        'echo "The river" | hbll-seq generate - --model runs/lm --temperature 0 --max-new-tokens 20',
        'hbll-seq generate "In 1923 ," --model runs/lm --path 1,2,4 --top-p 0.9 --seed 0',
        "hbll-seq eval my.txt --model runs/lm",
        "cat my.txt | hbll-seq eval - --model runs/lm --depth 1,3,7 --path 4,6,7",
        "hbll-seq eval --data bundled --split test --model runs/lm --max-batches 10",
        "hbll-seq eval my.txt --model runs/lm --depth 3 --json",
        "hbll-seq compare runs/lm runs/mine --text my.txt --depth 1,3,7",
        'hbll-seq compare runs/lm --prompt "The river" --depth 1,3,7 --max-new-tokens 20 --seed 0',
        "hbll-seq info runs/lm",
        "hbll-seq paths runs/lm",
        "hbll-seq export runs/lm small-model --depth 3",
        'hbll-seq generate "The river" --model small-model --max-new-tokens 20',
    )},
}  # fmt: skip
#: the other commands of shell blocks: their options are read, or what they name is looked up
READ = {
    "accelerate launch --multi_gpu --num_processes 4 train/lm.py --block-parallel 2 --n-level 4",
    "accelerate launch --multi_gpu --num_processes 4 train/lm.py --block-parallel 2",
    "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/lm.py --block-parallel 2",
    'pip install -c constraints.txt -e .',
    'pip install -c constraints.txt -e ".[test]"',
    'pip install -c constraints.txt -e ".[demo]"',
    "hbll-seq demo --model runs/lm --port 8000",
    'pip install -c constraints.txt -e ".[hf]"',
    "python -m hbll_seq.integrations.lm_eval --model hbll -a pretrained=runs/lm,depth=3 --tasks piqa",
    "pytest -n 2",
    "pytest -m slow",
    "pytest tests/engine/test_scan.py",
    "python docs/pictures/make_pictures.py",
    "hbll-seq train --preset debug --output-dir runs/debug",
    "hbll-seq push runs/lm me/my-model --private --license apache-2.0",
    "python train/lm.py --cuda-graph --depth-mix few --output-dir runs/graphed",
    "python train/lm.py --preset debug --output-dir runs/debug",
    "accelerate launch train/lm.py --preset debug --output-dir runs/debug",
    "accelerate launch train/lm.py --data my.txt --output-dir runs/mine --n-embd 256 --max-steps 5000",
    "accelerate launch train/lm.py --objective tree --output-dir runs/tree",
    "accelerate launch train/lm.py --objective backprop --path 4,6,7 --output-dir runs/backprop-3",
    "accelerate launch train/lm.py --preset mingru-small --output-dir runs/rnn",
    "accelerate launch train/lm.py --preset wikitext-103 --output-dir runs/wt103",
    "python train/experiments/seqmnist.py --data FOLDER_OF_IDX_FILES --permuted --n 16",
    "python train/experiments/cifar.py --data FOLDER --epochs 20 --missing 0.5",
    "python train/experiments/compare.py --quick --output quick.json",
    "python train/experiments/compare.py --methods mix --lrs 1.5e-3 3e-3 --seeds 0 1 --output new.json",
}  # fmt: skip


def load(script: Path):
    """A script as a module; what lies beside it can be imported, as when it is run."""
    name = f"of_docs_{script.stem}"
    if name not in sys.modules:
        sys.path.insert(0, str(script.parent))
        spec = importlib.util.spec_from_file_location(name, script)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.path.remove(str(script.parent))
    return sys.modules[name]


def script_and_options(command: str) -> tuple[Path, list[str]]:
    """Of "python SCRIPT OPTIONS", and of launchers with options of their own before the script."""
    words = shlex.split(command)
    first = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return ROOT / words[first], words[first + 1:]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of all blocks, with a text and the model that the README's training command makes."""
    folder = tmp_path_factory.mktemp("docs")
    rng, words = random.Random(0), "tree node level block the a of in reads writes state path . ,".split()
    text = "\n".join(" ".join(rng.choice(words) for _ in range(12)) for _ in range(600))
    (folder / "my.txt").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    before = os.getcwd()
    os.chdir(folder)
    try:
        run(RUN["accelerate launch train/lm.py"])
    finally:
        os.chdir(before)
    yield folder
    torch.set_num_threads(threads)


def run(command: str) -> None:
    """A command of ours, in this process."""
    if is_of_program(command):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", said_to(command))
            assert cli.main(shlex.split(command.split(" | ")[-1])[1:]) == 0, command
        return
    script, options = script_and_options(command)
    assert load(script).main(options) in (0, None), command


def is_of_program(command: str) -> bool:
    """Whether it runs ``hbll-seq``, behind a pipe perhaps."""
    return command.split(" | ")[-1].startswith("hbll-seq ")


def said_to(command: str) -> io.TextIOWrapper:
    """The stdin of a command: what ``echo TEXT |`` or ``cat FILE |`` before it gives."""
    *before, _ = command.split(" | ")
    words = shlex.split(before[0]) if before else ["echo"]
    data = Path(words[1]).read_bytes() if words[0] == "cat" else " ".join([*words[1:], "\n"]).encode()
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.fixture
def here(folder, monkeypatch):
    """The test is in that folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HBLL_CACHE", str(folder / "cache"))
    return folder


# --------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE],
                         ids=named)
def test_python_blocks_run(page, here, capsys):
    torch.manual_seed(0)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), names)
        if "backward()" in block:  # what a block calls trained has gradients
            gradients = [p.grad for p in names["model"].parameters() if p.grad is not None]
            assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_there_are_blocks_to_run():
    assert len(blocks(ROOT / "README.md", "python")) == 3
    assert sum(len(blocks(page, "python")) for page in PAGES) > 12


# -------------------------------------------------------------------------------------------------------------- commands


def test_every_command_of_a_shell_block_has_its_place():
    found = {command for page in PAGES for command in shell_commands(page)}
    assert found == set(RUN) | READ


def test_the_two_commands_of_the_readme():
    """As they must stand there, word for word."""
    lines = "\n".join(blocks(ROOT / "README.md", "bash")).splitlines()
    assert "pip install -c constraints.txt -e . && accelerate launch train/lm.py" in lines
    assert 'pip install -c constraints.txt -e ".[test]" && pytest -n 2' in lines


def test_commands_run(here):
    for command, shortened in RUN.items():
        if command != "accelerate launch train/lm.py":  # made the folder's model
            run(shortened)
    assert (here / "runs" / "mine" / "model.safetensors").exists() and (here / "runs" / "hybrid" / "metrics.json").exists()


@pytest.mark.parametrize("command", sorted(set(RUN) | READ | {c for page in PAGES for c in inline_commands(page)}))
def test_options_of_commands_are_understood(command, here):
    words = shlex.split(command)
    if words[0] == "pip":
        _check_pip(words[2:])
    elif words[0] == "pytest":
        _check_pytest(words[1:])
    elif is_of_program(command):
        _check_program(shlex.split(command.split(" | ")[-1])[1:])
    elif "-m" in words[:3]:  # of python and of accelerate launch
        assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None
    else:
        _check_script(*script_and_options(command))


def _check_pip(options: list[str]) -> None:
    assert options[:3] == ["-c", "constraints.txt", "-e"] and (ROOT / "constraints.txt").exists()
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2], re.M)
    assert "test" in extras and options[3] in {".", *(f".[{extra}]" for extra in extras)}


def _check_pytest(options: list[str]) -> None:
    assert all((ROOT / word).exists() for word in options if word.startswith("tests/"))
    assert "-m" not in options or f"{options[options.index('-m') + 1]}:" in (ROOT / "pyproject.toml").read_text()


def _check_program(words: list[str]) -> None:
    if words[0] in COMMANDS and "--help" not in words:
        module = importlib.import_module(f"hbll_seq.cli.{COMMANDS[words[0]][0]}")
        if hasattr(module, "parser"):
            module.parser("hbll-seq").parse_args(words[1:])
        else:
            assert module.main([*words[1:], "--dry-run"]) == 0
    else:
        assert cli.main(words) == 0


def _check_script(script: Path, options: list[str]) -> None:
    assert script.exists()
    module = load(script)
    if script.name == "lm.py" and not {"--resume", "--extend", "--init-from", "--help"} & set(options):
        assert module.main([*options, "--dry-run"]) == 0
    elif hasattr(module, "parse"):
        module.parse(options)
    elif options:  # it parses inside of main
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            module.main(["--help"])
        assert ended.value.code == 0
        assert [word for word in options if word.startswith("--") and word not in shown.getvalue()] == []


def test_every_public_name_has_an_example_that_runs():
    shown = "\n".join(block for page in PAGES if page.name not in ELSEWHERE for block in blocks(page, "python"))
    names = set(re.findall(r"\w+", shown))
    assert sorted(set(hbll_seq.__all__) - names) == []
