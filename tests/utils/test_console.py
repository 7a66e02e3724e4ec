"""Output never ends a program."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbll_seq.utils.console import ForgivingStream, forgiving_output, printable, say

ROOT = Path(__file__).resolve().parents[2]
#: hbll_seq without its __init__, which imports torch
BARE = """
import sys, types
sys.modules["hbll_seq"] = types.ModuleType("hbll_seq")
sys.modules["hbll_seq"].__path__ = ["hbll_seq"]
"""
PROGRAM = BARE + """
from hbll_seq.utils.console import forgiving_output
with forgiving_output():
    for i in range(3000):
        print("line", i, "\\u4e2d\\u6587 \\U0001f600")
        sys.stderr.write("warning \\u00e9\\n")
    print("end", flush=True)
sys.exit(7)
"""


def run(shell_redirection, **environment):
    return subprocess.run(["bash", "-c", f'"$0" -c "$1" {shell_redirection}', sys.executable, PROGRAM],
                          cwd=ROOT, env={**os.environ, **environment}, capture_output=True, timeout=60)


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&-", "> >(head -1) 2> >(head -1)", ">/dev/null"])
def test_a_program_runs_to_its_end_whatever_becomes_of_its_output(redirection):
    assert run(redirection).returncode == 7


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_characters_that_an_encoding_lacks_are_escaped(encoding):
    done = run("", PYTHONIOENCODING=encoding)
    assert done.returncode == 7
    if encoding != "utf-16":
        assert b"line 2999 \\u4e2d\\u6587 \\U0001f600" in done.stdout
    assert "end" in done.stdout.decode(encoding)


def test_no_file_gets_the_number_of_a_closed_output(tmp_path):
    """What a library of C prints would be written into it, between the weights of a checkpoint."""
    program = BARE + ("from hbll_seq.utils.console import forgiving_output\n"
               "with forgiving_output():\n    file = open(sys.argv[1], 'wb')\n    sys.exit(file.fileno() > 2)")
    command = ["bash", "-c", '"$0" -c "$1" "$2" >&- 2>&-', sys.executable, program, str(tmp_path / "file")]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 1


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_library_says_nothing_rather_than_fail(capsys):
    say("to nobody", file=Broken())
    closed = io.StringIO()
    closed.close()
    say("to nobody", file=closed)
    say("hello")
    assert capsys.readouterr().err == "hello\n"


def test_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(KeyError), forgiving_output():
        assert isinstance(sys.stdout, ForgivingStream) and sys.stdout.encoding
        raise KeyError
    assert (sys.stdout, sys.stderr) == before


def test_escape_sequences_are_shown_not_obeyed():
    assert printable("a\tb\n\x1b[2J\x07\x9b") == "a\tb\n\\x1b[2J\\x07\\x9b"


def test_a_text_is_shown_in_the_order_that_it_has():
    assert printable("a\u202eb\u2066c\u200f") == "a\\u202eb\\u2066c\\u200f"
    assert printable("\u05d0\u4e2d\u00e9") == "\u05d0\u4e2d\u00e9"
