"""A small model as a folder, and the program in this process."""

import io
import json
import sys

import pytest
from helpers.language_models import TOKENIZER, model_of

from hbll_seq.cli import main


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """The folder of a model of 7 random blocks."""
    folder = tmp_path_factory.mktemp("cli") / "runs" / "lm"
    model_of(TOKENIZER, default_paths="prefix", trained_paths="all").save_pretrained(folder)
    return folder


class Stdin:
    """What a pipe gives to a program."""

    def __init__(self, data: bytes):
        self.buffer = io.BytesIO(data)

    def isatty(self):
        return False


@pytest.fixture
def cli(lm, capsys, monkeypatch, tmp_path):
    """Runs a command and returns its stdout, or stderr where it fails; ``told`` is the last one's stderr. The folder of work
    holds runs/lm."""
    monkeypatch.chdir(lm.parent.parent)

    def run(*argv, stdin=b"", code=0):
        monkeypatch.setattr(sys, "stdin", Stdin(stdin.encode() if isinstance(stdin, str) else stdin))
        ended = main([str(word) for word in argv])
        said = capsys.readouterr()
        run.told = said.err
        assert ended == code, said.err
        assert code == 0 or said.out == ""
        return said.out if code == 0 else said.err

    run.json = lambda *argv, **options: json.loads(run(*argv, "--json", **options))
    return run
