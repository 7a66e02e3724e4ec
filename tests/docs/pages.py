"""What the tests of the documents share: the pages, their blocks, and the commands that they show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: what a command in running text or in a table begins with
STARTS = ("python ", "accelerate launch ", "pip install ", "pytest", "hbll-seq ")


def named(page: Path) -> str:
    """A page's path in the repository, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order, without the indentation of a list that they stand in."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in fence.findall(page.read_text("utf-8"))]


def languages(page: Path) -> list[str]:
    """The language of every fenced block."""
    fences = re.findall(r"^ *```(.*)$", page.read_text("utf-8"), re.MULTILINE)
    return fences[::2]


def shell_commands(page: Path) -> list[str]:
    """Every command of the shell blocks: comments dropped, what ``&&`` joins taken apart."""
    lines = "\n".join(blocks(page, "bash")).splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def inline_commands(page: Path) -> list[str]:
    """Every command between backticks, in running text and tables, that is not in a block."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in spans if span.startswith(STARTS) and len(shlex.split(span)) > 1]
