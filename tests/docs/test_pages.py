"""The documents: their length, their lines, their links, and the references that docstrings make to them."""

import importlib.util
import re
import sys

import pytest
import yaml
from pages import PAGES, ROOT, languages, named

import hbll_seq

FOLDERS = ("hbll_seq", "train", "tests", "tokenizers", "docs")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
METHOD = ROOT / "docs" / "method.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=named)


def anchors(text: str) -> set[str]:
    """What a link may name of a page, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[`*]", "", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(text: str) -> list[str]:
    """Targets of links and pictures inside the repository; what stands in blocks is code."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@each_page
def test_lines_keep_within_100_columns(page):
    """Tables, whose rows cannot be broken, are left aside."""
    lines = page.read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.lstrip().startswith("|")] == []


@each_page
def test_tables_have_one_row_a_line(page):
    """A table that somebody reflowed into a paragraph has its rule in the middle of a line."""
    lines = page.read_text("utf-8").splitlines()
    assert [line for line in lines if "|---" in line and not line.lstrip().startswith("|---")] == []


@each_page
def test_the_first_paragraph_says_what_the_page_is_for(page):
    title, paragraph, *_ = re.split(r"\n\s*\n", page.read_text("utf-8"))
    assert re.fullmatch(r"# [^\n]+", title)
    assert 40 < len(paragraph) and not re.match(r"[#|`<!-]", paragraph)
    if page.name != "README.md":
        assert paragraph.startswith("This page ")


@each_page
def test_links_lead_somewhere(page):
    for target in links(page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        where = page.parent / name if name else page
        assert where.exists(), target
        assert not anchor or anchor in anchors(where.read_text("utf-8")), target


@each_page
def test_every_fenced_block_has_a_language_that_a_test_runs(page):
    assert set(languages(page)) <= {"python", "bash"}


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links((ROOT / "README.md").read_text("utf-8"))}
    assert set(PAGES) - {ROOT / "README.md"} - linked == set()


def test_every_stored_result_has_its_place_in_the_results():
    """And no page names a file of results that is not there."""
    stored = {path.name for path in (ROOT / "train" / "results").glob("*.json")}
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert {name for name in stored if f"train/results/{name}" not in page} == set()
    texts = {page.read_text("utf-8") for page in PAGES}
    assert {name for text in texts for name in re.findall(r"train/results/([\w-]+\.json)", text)} <= stored


def test_every_section_that_a_docstring_names_exists():
    sections = set(re.findall(r"^#{2,3} (\d[\d.]*?)\.? ", METHOD.read_text("utf-8"), re.MULTILINE))
    references = {(number, named(path)) for path in [*CODE, *PAGES]
                  for number in re.findall(r"method\.md(?:\]\([^)]*\))?,? (\d\.\d)", path.read_text("utf-8"))}  # fmt: skip
    assert len(sections) > 8 and len(references) > 20
    assert {reference for reference in references if reference[0] not in sections} == set()


def test_the_source_of_the_mathematics_is_in_the_repository():
    """No reference to notes that a reader of the repository does not have."""
    own = ROOT / "tests" / "docs" / "test_pages.py"
    assert [named(path) for path in CODE if path != own and re.search(r"METHOD( \d|\.md)", path.read_text("utf-8"))] == []


def test_citation_and_changes_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == hbll_seq.__version__
    assert "2606.21497" in citation["preferred-citation"]["url"] and len(citation["preferred-citation"]["authors"]) == 7
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest[1] == hbll_seq.__version__
    assert f'\nversion = "{hbll_seq.__version__}"\n' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_pictures_are_drawn_alike_twice_and_for_both_backgrounds(tmp_path, monkeypatch):
    script = ROOT / "docs" / "pictures" / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_pictures", module)
    spec.loader.exec_module(module)
    first, second = (module.make_all(tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert {path.name for path in first} == {path.name for path in script.parent.glob("*.svg")}
    assert all(
        f"{name}-{theme}.svg" in {path.name for path in first} for name in module.PICTURES for theme in ("light", "dark")
    )


def test_code_names_no_section_that_left_the_readme():
    """They are in docs/results.md and docs/lab-log.md."""
    files = [*CODE, *(ROOT / "hbll_seq" / "training" / "presets").glob("*.yaml")]
    left = re.compile(r'README, "?(What we tried|Results)|see README')
    own = ROOT / "tests" / "docs" / "test_pages.py"
    assert [named(path) for path in files if path != own and left.search(path.read_text("utf-8"))] == []
