"""A page to play with, served on this machine: text at the depth of a slider, and which words need depth.

It needs the extra ``[demo]`` (Gradio). Everything the page shows comes from this machine: no fonts, scripts or statistics of
others, and the browser is told to refuse any.
"""

from __future__ import annotations

import html
import itertools
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hbll_seq.evaluation.token_losses import token_losses
from hbll_seq.generation.decoding import generate_ids
from hbll_seq.generation.sampling import SamplingParams
from hbll_seq.generation.text_pieces import TextPieces
from hbll_seq.integrations import heat_map
from hbll_seq.integrations.extras import how_to_install
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.tree.topology import path_text
from hbll_seq.utils.console import printable, say
from hbll_seq.utils.reading import quote
from hbll_seq.utils.values import as_whole

#: seconds between two updates of the page; a small model is faster than a browser
_PAUSE = 0.05
#: addresses and names of this machine alone
_LOCAL = ("127.0.0.1", "localhost", "::1")
#: tokens of a pasted text that are read
MAX_TOKENS = 400
#: what the browser may load: what comes from this server
_POLICY = ("default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'; "
           "base-uri 'self'")
PROMPT = "The history of the city"
TEXT = ("The river was named after the city , and the city was named after the river . In the summer of 1916 the British "
        "Army began an attack on the German lines , and the Army of the United States joined the war in April 1917 .")
CSS = heat_map.CSS + """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9em; font-size: 16px; line-height: 1.5; }
.text .prompt { opacity: .6; }
.text .note { display: block; margin-top: 12px; font-size: 13px; opacity: .75; }
footer { display: none !important; }
"""


class Progress(NamedTuple):
    """How far a text has come.

    text: what was added to the prompt.
    n_tokens: in how many tokens.
    first: seconds until the first token, in which the prompt is read.
    each: seconds a token after the first; 0 before there is a second.
    """

    text: str
    n_tokens: int
    first: float
    each: float


def progress(model: HBLLForCausalLM, prompt: str, depth: int | None, sampling: SamplingParams) -> Iterator[Progress]:
    """Continue a prompt, token by token; time that the reader takes between two tokens is not counted.

    Of a prompt longer than the model's context the end is kept.

    Raises:
        ValueError: the prompt is empty, the depth is not possible, or the model has no tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not prompt:
        raise ValueError("prompt='': nothing to continue; give at least one character" if tokenizer else
                         "this model has no tokenizer, which text needs: load a folder that holds tokenizer.model")
    ids, path, pieces = tokenizer.encode(prompt), model.resolve_path(depth), TextPieces(tokenizer)
    ids = ids[-model.config.context_length :] if model.config.has_attention else ids
    ends = dict(eos_id=tokenizer.eos_id, n_tokens=tokenizer.vocab_size)
    steps, text, first, later = generate_ids(model, [ids], path, sampling, **ends), "", 0.0, 0.0
    for n_tokens in itertools.count(1):
        started = time.perf_counter()
        step = next(steps, None)
        took = time.perf_counter() - started
        if step is None:
            return
        first, later = (took, 0.0) if n_tokens == 1 else (first, later + took)
        text += pieces.push(step[0])
        yield Progress(text.rstrip("\ufffd"), n_tokens, first, later / max(1, n_tokens - 1))


def text_html(prompt: str, done: Progress | None = None, path: tuple[int, ...] = ()) -> str:
    """The prompt, what was added, and how long a token took, as HTML; control characters are shown as escapes."""
    shown = f'<span class="prompt">{html.escape(printable(prompt))}</span>'
    if done is not None:
        each, first = 1000 * done.each, 1000 * done.first
        note = f"{done.n_tokens} tokens, {each:.1f} milliseconds a token, the first after {first:.0f}"
        shown += f'{html.escape(printable(done.text))}<span class="note">{note}; path {path_text(path)}</span>'
    return f'<div class="text">{shown}</div>'


def losses_html(model: HBLLForCausalLM, text: str) -> str:
    """The heat map of a text. Raises ValueError for an empty one."""
    if not text.strip():
        raise ValueError("there is no text: paste some words")
    losses = token_losses(model, text, max_tokens=MAX_TOKENS)
    cut = f"<p>The first {MAX_TOKENS} tokens.</p>" if len(losses.tokens) == MAX_TOKENS else ""
    return cut + heat_map.heat_map(losses)


class Page:
    """What the page's buttons do.

    Args:
        model: with a tokenizer; in evaluation mode from here on.
    """

    def __init__(self, model: HBLLForCausalLM):
        self.model = model.eval()
        #: depth that the slider ends at; of an exported path the blocks that it holds
        self.n_blocks = len(model.config.full_path)

    def write(self, prompt: str, depth: int, n: int, temperature: float, top_k: int, top_p: float, seed: str
              ) -> Iterator[str]:
        """The text as HTML, some times a second; ``top_k=0`` and ``top_p=1`` leave nothing out, no seed draws anew."""
        seed = seed.strip()
        if seed and not (seed.isdecimal() and len(seed) < 19):
            raise ValueError(f"seed={quote(seed)}: must be a whole number, or empty for another text each time")
        sampling = SamplingParams(max_new_tokens=int(n), temperature=float(temperature), top_k=int(top_k) or None,
                                  top_p=None if top_p >= 1 else float(top_p), seed=int(seed) if seed else None)
        depth, done, shown = int(depth), None, 0.0
        path = self.model.resolve_path(depth)
        for done in progress(self.model, prompt, depth, sampling):
            if time.perf_counter() - shown >= _PAUSE:
                yield text_html(prompt, done, path)
                shown = time.perf_counter()
        yield text_html(prompt, done, path)

    def losses(self, text: str) -> str:
        """The heat map as HTML."""
        return losses_html(self.model, text)


def make_page(model: HBLLForCausalLM, name: str) -> Any:
    """The page, a ``gradio.Blocks``. Raises ValueError where Gradio is not installed."""
    gr = _gradio()
    page = Page(model)
    n_parameters = sum(p.numel() for p in model.parameters())

    def told(call: Any) -> Any:
        """The call, with errors of the input shown on the page."""
        def stream(*values: Any) -> Iterator[str]:
            try:
                found = call(*values)
                yield from [found] if isinstance(found, str) else found
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from None
        return stream

    with gr.Blocks(analytics_enabled=False, title="hbll_seq") as blocks:
        gr.Markdown(f"# One model, any depth\n**{_plain(name)}**: {page.n_blocks} blocks, {n_parameters:,} parameters. "
                    "Choose how many blocks each token runs through.")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=3, elem_id="prompt")
                text = gr.HTML(text_html(PROMPT), elem_id="text")
            with gr.Column(scale=1, min_width=300):
                depth = gr.Slider(1, page.n_blocks, page.n_blocks, step=1, label="Depth (blocks)", elem_id="depth")
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                options = _sampling_options(gr)
        gr.Markdown("## Which words need depth?")
        pasted = gr.Textbox(TEXT, label="Any text", lines=4, elem_id="pasted")
        show = gr.Button("Show the losses", variant="primary", elem_id="show")
        losses = gr.HTML(elem_id="losses")
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        writing = gr.on([go.click, prompt.submit], told(page.write), [prompt, depth, *options], text, **private)
        stop.click(None, cancels=[writing], api_visibility="private")
        show.click(told(page.losses), pasted, losses, **private)
    return blocks


def _sampling_options(gr: Any) -> list[Any]:
    """The controls of :meth:`Page.write` from the number of tokens on, in its order."""
    usual = SamplingParams()
    with gr.Accordion("Sampling", open=True):
        return [
            gr.Slider(10, 500, usual.max_new_tokens, step=10, label="Tokens"),
            gr.Slider(0, 1.5, usual.temperature, step=0.05, label="Temperature"),
            gr.Slider(0, 200, 40, step=1, label="Top-k (0: all)"),
            gr.Slider(0.05, 1, 1.0, step=0.05, label="Top-p (1: all)"),
            gr.Textbox("", label="Seed", placeholder="another text each time", max_lines=1),
        ]


def serve(
    model: HBLLForCausalLM, name: str = "", *, host: str = "127.0.0.1", port: int | None = None, wait: bool = True
) -> Any:
    """Serve the page until Ctrl-C.

    Args:
        model: with a tokenizer.
        name: of the model, for the page's head.
        host: the address to listen on; only the default one is of this machine alone.
        port: None takes the first free one from 7860 on.
        wait: False returns at once; the page is served until ``.close()`` of what is returned, or the program's end.

    Raises:
        ValueError: Gradio is not installed, the model has no tokenizer, or the port cannot be had.
    """
    gr = _gradio()
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer, which a page of texts needs: load a folder that holds tokenizer.model")
    if port is not None:
        _check_port(host, port)
    if next(model.parameters()).device.type == "cpu" and next(model.parameters()).dtype in (torch.float16, torch.bfloat16):
        model = model.float()  # a CPU is slower in half precision
    page = make_page(model, name or type(model).__name__)
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the reader's machine: none is fetched
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts[0], font_mono=fonts[1])
    _, address, _ = page.queue().launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[], theme=theme,
        css=CSS, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
        app_kwargs={"middleware": _guards(host)},
    )  # fmt: skip
    say(f"hbll-seq: the page is at {address} (Ctrl-C ends it)")
    if host not in _LOCAL:
        say("hbll-seq: whoever can reach this machine can use the page")
    if wait:
        page.block_thread()
    return page


def _guards(host: str) -> list[Any]:
    """The page's middleware, where ``host`` is listened on."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if host not in _LOCAL:
        return [Middleware(_Policy)]
    # Else a page of another site could give its own name this machine's address, and read along. Of "[::1]:7860" older
    # versions take "[" for the name.
    return [Middleware(_Policy), Middleware(TrustedHostMiddleware, allowed_hosts=[*_LOCAL, "[::1]", "["])]


class _Policy:
    """ASGI middleware: tells the browser to load nothing from elsewhere."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    try:
        import gradio
    except ImportError:
        raise ValueError(f"the page needs Gradio: {how_to_install('gradio', 'demo')}") from None
    return gradio


def _check_port(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen there."""
    as_whole("port", port, 1, 65535)
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(f"host={host!r}, port={port}: cannot listen there ({error}); choose another --port, or leave it out "
                         "for the first free one") from None


def _plain(name: str) -> str:
    """A name in Markdown, as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-.!|<>~" else c for c in printable(name))
