"""The program around the commands: help, mistakes, exit codes, and output that fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

import hbll_seq
from hbll_seq.cli import models, program
from hbll_seq.cli.output import Output
from hbll_seq.utils.tables import table

ROOT = Path(__file__).resolve().parents[2]
#: whose help is that of the training run
WITHOUT_PARSER = {"train"}


def test_help_and_version_of_every_command(cli):
    shown = cli("--help")
    assert all(name in shown and about in shown for name, (_, about) in program.COMMANDS.items())
    assert cli("--version") == f"hbll-seq {hbll_seq.__version__}\n"
    for name in set(program.COMMANDS) - WITHOUT_PARSER:
        shown = cli(name, "--help")
        assert shown.startswith(f"usage: hbll-seq {name}") and "\nexamples:\n  h" in shown
    assert "commands:" in cli(code=2)


def test_help_keeps_within_80_columns(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([name] for name in program.COMMANDS)):
        assert [line for line in cli(*command, "--help").splitlines() if len(line) > 80] == [], command


def test_help_needs_no_torch():
    program = ("import sys\nfrom hbll_seq.cli import main\nfrom hbll_seq.cli.program import COMMANDS\n"
               f"codes = [main([name, '--help']) for name in COMMANDS if name not in {WITHOUT_PARSER}] + [main(['--help'])]\n"
               "sys.exit(any(codes) or 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_mistakes_of_a_command_line_need_no_torch():
    """A mistake is told at once: torch takes seconds to load."""
    wrong = [["generat", "x"], ["--verson"], ["eval", "--modle", "x"], ["generate", "x", "--top-k", "0"],
             ["eval", "--split", "tset"], ["paths", "--timed-tokens", "0"]]  # fmt: skip
    program = ("import sys\nfrom hbll_seq.cli import main\n"
               f"codes = [main(argv) for argv in {wrong}]\nsys.exit(codes != [2] * {len(wrong)} or 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argv,message", [
    (["genrate"], "error: there is no command 'genrate'; did you mean generate? (see hbll-seq --help)\n"),
    (["--verson"], "error: unrecognized arguments: --verson; did you mean --version? (see hbll-seq --help)\n"),
    (["eval", "--modle", "x"], "did you mean --model? (see hbll-seq eval --help)\n"),
    (["eval", "--mod", "x"], "unrecognized arguments: --mod"),
    (["eval", "--split", "tset"], "'tset' is none of train, validation, test; did you mean test?"),
    (["info", "runs/ml"], "error: there is no model 'runs/ml' here; did you mean runs/lm?\n"),
    (["info", "bundeld"], "did you mean bundled?"),
    (["info", "zzzz"], "there is no folder 'zzzz', and it is no Hub id"),
    (["generate", "x", "--model", "runs/lm", "--depth", "bst"], "'bst' is not a number of blocks, best, fast or all; did"),
    (["generate", "x", "--model", "runs/lm", "--depth", "9"], "depth=9: a model with n_level=3 runs 1 to 7 blocks"),
    (["generate", "x", "--model", "runs/lm", "--depth", "3", "--path", "4"], "not allowed with"),
    (["generate", "x", "--model", "runs/lm", "--path", "1,x"], "'1,x' is not a list of block numbers such as 1,2,4"),
    (["generate", "x", "--top-k", "0"], "top_k=0: must be a whole number of at least 1"),
    (["generate", "x", "--logprobs", "3", "--model", "runs/lm"], "--logprobs belongs to --json"),
    (["generate", "x", "--logprobs", "-3"], "argument --logprobs"),
    (["generate", "x", "--top-k", "few"], "argument --top-k: 'few' is not a whole number"),
    (["generate", "--model", "runs/lm"], "stdin holds no prompt"),
    (["eval", "nothing.txt", "--model", "runs/lm"], "cannot read 'nothing.txt': No such file or directory"),
    (["eval", "runs", "--model", "runs/lm"], "'runs' is a folder"),
    (["eval", "runs/lm/model.safetensors", "--model", "runs/lm"], "): convert it, e.g. with `iconv -f LATIN1 -t UTF-8`;"),
    (["eval", "--model", "runs/lm"], "error: no text: give FILE, - to read stdin, or --data bundled --split test\n"),
    (["eval", "-", "--model", "runs/lm"], "stdin is empty: give some text, FILE, or --data bundled --split test"),
    (["eval", "x.txt", "--data", "bundled"], "choose one text"),
    (["eval", "x.txt", "--split", "test"], "--split belongs to --data"),
    (["eval", "x.txt", "--column", "body"], "--column belongs to --data"),
    (["eval", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
    (["compare", "runs/lm", "--prompt", "x", "--text", "y"], "--prompt and --text are both given"),
    (["compare", "runs/lm", "--seed", "1"], "--seed belongs to --prompt"),
    (["export", "runs/lm", "small"], "one of the arguments --depth --path is required"),
    (["export", "runs/lm", "small", "--path", "2,6"], "the step 2 -> 6 is not a dyadic interval"),
    (["paths", "runs/lm", "--timed-tokens", "0"], "'0' is not a whole number of at least 1"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(cli, argv, message):
    said = cli(*argv, code=2)
    assert message in said and said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1000


def test_the_folder_of_an_unfinished_run_is_told_as_such_alone(cli, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for command in (["generate", "x", "--model"], ["eval", "x.txt", "--model"], ["paths"], ["info"]):
        (tmp_path / "x.txt").write_text("x")
        said = cli(*(tmp_path / word if word == "x.txt" else word for word in command), tmp_path / "run", code=2)
        assert said.startswith("error: ") and said.count("\n") == 1
        assert "holds a run that is not finished, and no config.json yet: go on with it by" in said


def test_failures_and_interrupts_have_codes_of_their_own(cli, monkeypatch):
    def raising(error):
        def open_model(*_):
            raise error

        monkeypatch.setattr(models, "open_model", open_model)

    for error, code, message in [
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device; make room"),
        (MemoryError("too much"), 1, "error: the memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: the memory is full"),
        (KeyboardInterrupt(), 130, ""),
    ]:
        raising(error)
        assert cli("info", "runs/lm", code=code).startswith(message)
    raising(RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="of ours"):  # its traceback is needed
        program.main(["info", "runs/lm"])


def environment():
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}


@pytest.fixture
def started():
    """Starts the program in a process of its own, which is ended with the test."""
    processes = []

    def start(*argv, **pipes):
        processes.append(Forked(["-m", "hbll_seq", *map(str, argv)], environment(), stderr=-1, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def test_a_reader_that_goes_ends_the_program_in_silence(lm, started):
    process = started("generate", "The", "--model", lm, "--max-new-tokens", 5000, stdout=-1)
    assert process.stdout.read(3) == b"The"
    process.stdout.close()
    process.stdout = None
    assert process.communicate(60)[1] == b"" and process.wait(10) == 141


def test_ctrl_c_ends_the_program_in_silence(lm, started):
    process = started("generate", "The", "--model", lm, "--max-new-tokens", 50000, stdout=-1)
    assert process.stdout.read(3) == b"The"
    process.send_signal(signal.SIGINT)
    assert process.communicate(60)[1] == b"" and process.wait(10) == 130


def test_stdin_must_be_text(cli):
    assert "stdin is not UTF-8 text (byte 2)" in cli("generate", "-", "--model", "runs/lm", stdin=b"ab\xff", code=2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the device that is always full")
def test_a_full_disk_is_told(lm, started):
    with open("/dev/full", "w") as full:
        process = started("info", lm, stdout=full.fileno())
        said = process.communicate(60)[1].decode()
    assert process.wait(10) == 1 and said.startswith("error: cannot write to stdout: No space left") and said.count("\n") == 1


class Narrow:
    """A terminal that knows few characters."""

    encoding = "ascii"

    def __init__(self):
        self.text = ""

    def write(self, text):
        text.encode("ascii")
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_narrow_terminal_gets_escapes():
    stream = Narrow()
    Output(stream).write("a\u4e2d\x1b[2J\n")
    assert stream.text == "a\\u4e2d\\x1b[2J\n"
    Output(None).write("nobody hears")


def test_a_table_aligns_its_columns():
    text = table(["name", "n", "x"], [["a", 1, None], ["bcdef", 1000, 0.5]], ["<", ",d", ".2f"])
    assert text.splitlines() == ["name       n     x", "a          1     -", "bcdef  1,000  0.50"]
