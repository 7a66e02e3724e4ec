"""The documents: references resolve inside the repository, and prose keeps within its columns."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CODE = sorted(path for folder in ("hbll_seq", "train", "tests", "tokenizers") for path in (ROOT / folder).rglob("*.py"))


def test_every_section_that_a_docstring_names_exists():
    sections = set(re.findall(r"^#{2,3} ([\d.]+?)\.? ", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE))
    pages = [*CODE, *PAGES]
    named = {(number, path.name) for path in pages for number in re.findall(r"method\.md (\d\.\d)", path.read_text())}
    assert len(sections) > 8 and len(named) > 20
    assert {name for name in named if name[0] not in sections} == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_keeps_within_100_columns(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "    "))] == []


def test_the_source_of_the_mathematics_is_in_the_repository():
    """No reference to notes that a reader of the repository does not have."""
    others = (path for path in CODE if path != Path(__file__).resolve())
    assert [path.name for path in others if re.search(r"METHOD( \d|\.md)", path.read_text())] == []
