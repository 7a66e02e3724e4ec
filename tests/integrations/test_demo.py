"""The page's parts without Gradio: the text as it comes, the heat map. A slow test opens the page in a browser."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.language_models import TOKENIZER, model_of

from hbll_seq import HBLLForCausalLM
from hbll_seq.evaluation.token_losses import TokenLosses
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.integrations import demo, heat_map

ROOT = Path(__file__).resolve().parents[2]
LOSSES = TokenLosses(("T", "he", " <b>", "\n", "x"), ((4,), (4, 6)), ("depth 1", "depth 2"),
                     torch.tensor([[4.0, 1.0, 9.0, 0.0, 2.0], [1.0, 1.0, 8.5, 0.5, 3.0]]))  # fmt: skip


class Tags(HTMLParser):
    """What a piece of HTML holds: tags with their number, texts; it must close what it opens."""

    def __init__(self, text):
        super().__init__()
        self.count, self.texts, self.open = {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


# ------------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("cell", ["transformer", "gru"])
def test_the_text_is_that_of_generate(cell):
    model = model_of(TOKENIZER, cell=cell)
    for depth in (1, 3, 7):
        sampling = SamplingParams(max_new_tokens=12, seed=3)
        steps = list(demo.progress(model, "The river", depth, sampling))
        whole = model.generate("The river", depth, sampling=sampling)
        assert [step.n_tokens for step in steps] == list(range(1, len(steps) + 1))
        assert whole.removeprefix("The river").rstrip("\ufffd") == steps[-1].text
        assert steps[0].each == 0 < steps[-1].each and all(step.first > 0 for step in steps)
        for a, b in zip(steps, steps[1:]):
            assert b.text.startswith(a.text)


def test_time_of_the_reader_does_not_count():
    steps = demo.progress(model_of(TOKENIZER), "The river", 1, SamplingParams(max_new_tokens=3))
    started = time.perf_counter()
    for _ in range(3):
        last = next(steps)
        time.sleep(0.2)
    assert last.first + 2 * last.each < time.perf_counter() - started - 0.5


def test_of_a_long_prompt_the_end_is_kept():
    model = model_of(TOKENIZER)
    long, sampling = "The river was named after the city . " * 5, SamplingParams(max_new_tokens=4, temperature=0)
    text = model.generate(long, 3, sampling=sampling, truncate_prompt=True)
    assert long + list(demo.progress(model, long, 3, sampling))[-1].text == text


def test_the_page_writes_and_checks_what_it_is_given():
    page = demo.Page(model_of(TOKENIZER).train())
    assert not page.model.training
    shown = list(page.write("a<b\x1b", 3, 10.0, 0.8, 0, 1, " 7 "))
    again = list(page.write("a<b\x1b", 3, 10, 0.8, 0, 1.0, "7"))
    assert shown[-1].partition('<span class="note">')[0] == again[-1].partition('<span class="note">')[0]
    assert '<span class="prompt">a&lt;b\\x1b</span>' in shown[-1] and "path 0-" in shown[-1] and "-head" in shown[-1]
    Tags(shown[-1])
    for values, message in [
        (("", 3, 10, 1, 0, 1, ""), "prompt=''"),
        (("x", 9, 10, 1, 0, 1, ""), "depth=9"),
        (("x", 3, 10, 1, 0, 1, "-1"), "seed='-1': must be a whole number"),
        (("x", 3, 0, 1, 0, 1, ""), "max_new_tokens=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(page.write(*values))
    with pytest.raises(ValueError, match="there is no text"):
        page.losses(" \n")


# ------------------------------------------------------------------------------------------------ heat map


def test_the_heat_map_has_a_cell_for_each_token_and_depth():
    page = heat_map.heat_map(LOSSES)
    tags = Tags(page)
    n_words = len(heat_map.words_that_need_depth(LOSSES))
    assert tags.count["td"] == 2 * 5 + n_words * (2 + 1)
    assert tags.count["table"] == 2 + 1  # the text's second line is one of its own
    assert "<b>" not in page and "&lt;b&gt;" in page and "\u23ce" in page
    assert "depth 1 \xa03.20" in tags.texts and "depth 2 \xa02.80" in tags.texts
    assert 'title="depth 1, T: 4.00 nats, probability 0.0183"' in page
    assert not re.search(r"https?:|<script|url\(", page + heat_map.CSS + demo.CSS)


def test_words_that_need_depth_are_those_that_gain_most():
    assert heat_map.words_that_need_depth(LOSSES) == [("The", [5.0, 2.0]), ("<b>", [9.0, 8.5])]
    assert heat_map.words_that_need_depth(LOSSES, 1) == [("The", [5.0, 2.0])]
    one = TokenLosses(LOSSES.tokens, ((4,),), ("depth 1",), LOSSES.nats[:1])
    assert 'class="words"' not in heat_map.heat_map(one) and 'class="words"' in heat_map.heat_map(LOSSES)


def test_colours_go_one_way():
    brightness = [sum(heat_map._colour(x)) for x in (-1, 0, 1, 2, 4, 6, 8, 9, float("inf"))]
    assert brightness[0] == brightness[1] and brightness[-1] == brightness[-3]
    assert brightness[1:7] == sorted(set(brightness), reverse=True)


@pytest.mark.parametrize("n", [1, 30, 1000])
def test_lines_hold_every_token_once(n):
    tokens = tuple(" w" + "x" * (i % 7) + "\n" * (i % 50 == 49) for i in range(n))
    lines = list(heat_map._lines(tokens))
    assert [i for start, end in lines for i in range(start, end)] == list(range(n))
    assert {end for _, end in lines} >= set(range(50, n, 50))
    widths = [sum(max(len(token), 5) + 1 for token in tokens[start:end]) for start, end in lines]
    assert max(widths) <= 118 and min(widths) >= (n > 1) * 60


def test_a_pasted_book_is_cut():
    page = demo.losses_html(model_of(TOKENIZER), "The river . " * 400)
    assert page.startswith(f"<p>The first {demo.MAX_TOKENS} tokens.</p>")
    assert "first" not in demo.losses_html(model_of(TOKENIZER), "The river .")


# ------------------------------------------------------------------------------------------------ serving


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'not installed: pip install "hbll_seq\[demo\]", or in a clone.*"\.\[demo\]"'):
        demo.serve(model_of(TOKENIZER))


def test_the_slider_ends_where_the_model_does(tmp_path):
    model_of(TOKENIZER, default_paths="prefix").export_path(3, tmp_path / "three")
    page = demo.Page(HBLLForCausalLM.from_pretrained(tmp_path / "three"))
    *_, text = page.write("The river", page.n_blocks, 3, 0, 0, 1, "")
    assert page.n_blocks == 3 and "path 0-1-2-4-head" in text


def test_what_cannot_be_served_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", object())
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer.model"):
        demo.serve(model_of())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match="cannot listen there.*choose another --port"):
            demo.serve(model_of(TOKENIZER), port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="cannot listen there"):
        demo.serve(model_of(TOKENIZER), host="no such host", port=8000)
    with pytest.raises(ValueError, match="port=70000: must be a whole number from 1 to 65535"):
        demo.serve(model_of(TOKENIZER), port=70_000)


@pytest.mark.parametrize(("address", "named", "status"), [
    ("127.0.0.1", "localhost:7860", 404), ("localhost", "127.0.0.1:7860", 404), ("::1", "[::1]:7860", 404),
    ("127.0.0.1", "evil.example:7860", 400), ("127.0.0.1", "", 400), ("0.0.0.0", "any.example", 404),
])  # fmt: skip
def test_a_page_of_this_machine_alone_answers_to_its_names_alone(address, named, status):
    """A page of another site that gives its own name this machine's address gets nothing."""
    applications = pytest.importorskip("starlette.applications", reason="needs the extra [demo]")
    app, sent = applications.Starlette(middleware=demo._guards(address)), []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"host", named.encode())]}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == status
    assert any(name == b"content-security-policy" for name, _ in sent[0]["headers"])


#: a server that tells every address of another machine which it asks for
_SERVER = """
import socket, sys
def told(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "localhost", "::1"):
        print("FOREIGN", args[1], file=sys.stderr, flush=True)
    if event == "socket.getaddrinfo" and args[0] not in (None, "127.0.0.1", "localhost", "::1", "0.0.0.0", ""):
        print("FOREIGN", args[0], file=sys.stderr, flush=True)
sys.addaudithook(told)
from hbll_seq.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(tmp_path, scheme):
    """Text at a depth that is asked for, the heat map, an error; and nothing is loaded from elsewhere, on either side."""
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("there is no Chromium")
    model_of(TOKENIZER, default_paths="prefix").save_pretrained(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = tmp_path / "stderr"
    argv = [sys.executable, "-c", _SERVER, "demo", "--model", str(tmp_path / "model"), "--port", str(port)]
    with said.open("w") as file:
        server = subprocess.Popen(argv, cwd=ROOT, stderr=file, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        address = f"http://127.0.0.1:{port}/"
        until = time.monotonic() + 120
        while address not in said.read_text():
            assert server.poll() is None and time.monotonic() < until, said.read_text()
            time.sleep(0.2)
        with sync_api.sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 1250, "height": 1500}, color_scheme=scheme)
            _use(page, address)
            page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
            chromium.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert "FOREIGN" not in said.read_text() and "Traceback" not in said.read_text()
    assert (tmp_path / f"{scheme}.png").stat().st_size > 20_000


def _use(page, address):
    """What a person does on the page."""
    page.set_default_timeout(120_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.fill("#depth input[type=number]", "2")
    page.keyboard.press("Tab")
    page.click("#write")
    page.wait_for_function("/100 tokens, .* milliseconds.*path 0-2-4-head/.test(document.querySelector('#text').innerText)")
    assert page.inner_text("#text .prompt") == demo.PROMPT
    page.fill("#pasted textarea", "The river\nof 1916")
    page.click("#show")
    page.wait_for_selector("#losses .heat table")
    assert page.locator("#losses th.row").count() == 2 * (7 + 1)
    page.fill("#prompt textarea", "")
    page.click("#write")
    page.wait_for_selector("text=nothing to continue")
    assert len(asked) > 5 and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []
