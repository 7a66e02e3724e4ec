"""What Python callers give: options of generate, ids of decode, and the paths and values of other public functions."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import torch

from hbll_seq import HBLLForCausalLM, Tokenizer, TokenWindows, generate, load_tokens
from hbll_seq.data.tokens import TokenStream
from hbll_seq.models.hub import find_latest_run

from .oracle import Case, Violation
from .reference import PROMPT, Reference
from .values import NOTHING, as_bool, as_ids, as_number, as_whole, describe, hostile

_KINDS = {
    "prompt": None, "depth": as_whole, "path": as_ids, "max_new_tokens": as_whole, "temperature": as_number,
    "top_k": as_whole,
    "top_p": as_number, "seed": as_whole, "stream": as_bool, "truncate_prompt": as_bool,
}  # fmt: skip
_MAY_BE_NONE = ("depth", "path", "top_k", "top_p", "seed")
_PATHS = (
    "", " ", ".", "..", "~", "~/x", "~no-such-user/x", "x", "x" * 300, "x/" * 3000, "a\0b", "\ud800", "a\nb", "\u5b57",
    "/dev/zero", "/dev/null",
    "/dev/full", "/proc/self/mem", "/proc/x", "/dev/null/x", b"bytes", b"\xff\xfe", "file", "file/x/y", "pipe", "loop",
    "dangling", "folder", "model",
    "latest", "a/b/c", "-", "*", "C:\\x", "http://x/y", "nul", "\u001b[2J",
)  # fmt: skip
_DEVICES = ("'/dev/", "PosixPath('/dev/", "b'/dev/")


def targets(reference: Reference) -> dict:
    """The targets over this unharmed model."""
    return {"generate": lambda rng, folder: generate_case(reference, rng),
            "decode": lambda rng, folder: decode_case(reference, rng),
            "arguments": lambda rng, folder: argument_case(reference, rng, folder)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- generate


def generate_case(reference: Reference, rng: random.Random) -> Case:
    """One to three options of generate, with hostile values."""
    state = rng.getstate()
    chosen = _options(rng)
    rng.setstate(state)
    again = _options(rng)  # the same values anew: iterators are read once
    what = ", ".join(f"{name}={describe(value)}" for name, value in chosen.items())
    model, entry = reference.language_model, rng.choice(("method", "method", "function", "stream"))
    if entry == "stream":
        chosen.pop("stream", None)

    def call(options: dict):
        torch.manual_seed(0)
        given = {"prompt": PROMPT, "max_new_tokens": 3, "seed": 1, **options}
        if entry == "stream":
            return given["prompt"] + "".join(model.stream(**given))
        return model.generate(**given) if entry == "method" else generate(model=model, **given)

    def judge(result) -> str:
        plain = {name: _plain(name, value) for name, value in again.items() if name in chosen}
        if bad := [name for name, value in plain.items() if value is NOTHING]:
            raise Violation("accepted in silence", f"{bad[0]}={describe(chosen[bad[0]])} is no value of this option")
        if result != call(plain):
            raise Violation("changed result", f"{what}: another text than with {describe(plain)}")
        return "accepted"

    return Case(f"{entry}: {what}", lambda: call(chosen), judge, (*chosen, *["text"] * ("prompt" in chosen)))


def _options(rng: random.Random) -> dict:
    options = {}
    for name in rng.sample(sorted(_KINDS), rng.choice((1, 1, 1, 2, 3))):
        value = hostile(rng)
        if name == "max_new_tokens" and isinstance(plain := as_whole(value), int) and plain > 10:
            value = rng.choice((0, -1, 1.5, "3", None))  # it would rightly go on for ever
        options[name] = value
    return options


def _plain(name: str, value):
    """The value that the given one plainly is, else NOTHING."""
    if value is None:
        return None if name in _MAY_BE_NONE else NOTHING
    if name == "prompt":
        texts = [value] if isinstance(value, str) else value
        return value if isinstance(texts, (list, tuple)) and texts and all(isinstance(t, str) for t in texts) else NOTHING
    return _KINDS[name](value)


# ---------------------------------------------------------------------------------------------------- decode


def decode_case(reference: Reference, rng: random.Random) -> Case:
    """Ids for decode: values of any type, and lists with one that is no id."""
    tokenizer = reference.words
    state = rng.getstate()
    value = _ids(rng, tokenizer.vocab_size)
    rng.setstate(state)
    again = _ids(rng, tokenizer.vocab_size)

    def judge(result) -> str:
        plain = as_ids(again)
        if plain is NOTHING or any(not 0 <= i < tokenizer.vocab_size for i in plain):
            raise Violation("accepted in silence", f"{describe(value)} is no list of ids, and gave {result[:40]!r}")
        if result != tokenizer.decode(plain):
            raise Violation("changed result", f"{describe(value)}: another text than that of {plain[:20]}")
        return "accepted"

    return Case(f"decode({describe(value)})", lambda: tokenizer.decode(value), judge, ("id", "ids"))


def _ids(rng: random.Random, vocab_size: int):
    if rng.random() < 0.5:
        value = hostile(rng)
        return [1] if isinstance(value, range) and len(value) > 10**6 else value
    ids = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 9))]
    at = rng.randrange(len(ids))
    choice = rng.random()
    if choice < 0.3:
        ids[at] = hostile(rng)
    elif choice < 0.5:
        ids[at] = rng.choice((-1, vocab_size, vocab_size - 1, 2**31, -(2**63), 2**64, 10**400))
    elif choice < 0.8:
        dtype = rng.choice((torch.int8, torch.uint8, torch.int16, torch.int64, torch.float32, torch.bool, torch.float16,
                            torch.complex64))
        tensor = torch.tensor(ids).to(dtype)
        return tensor if rng.random() < 0.5 or dtype == torch.bool else tensor.numpy()
    return rng.choice((list, tuple, iter, lambda ids: (i for i in ids), lambda ids: dict(enumerate(ids)),
                       lambda ids: [ids]))(ids)


# ---------------------------------------------------------------------------------------------------- other arguments


def argument_case(reference: Reference, rng: random.Random, folder: Path) -> Case:
    """Paths and values for the public functions that take them."""
    _furnish(reference, folder)
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    path = rng.choice(_PATHS) if rng.random() < 0.6 else hostile(rng)
    value, model = hostile(rng), reference.language_model
    target = "x" if str(describe(path)).startswith(_DEVICES) else path  # who may write there would replace the device
    calls = {
        "from_pretrained": (lambda: HBLLForCausalLM.from_pretrained(path), path),
        "save_pretrained": (lambda: model.save_pretrained(target), target),
        "generate(model=)": (lambda: generate(PROMPT, model=path, max_new_tokens=1), path),
        "Tokenizer.from_file": (lambda: Tokenizer.from_file(path), path),
        "Tokenizer.save": (lambda: reference.words.save(target), target),
        "find_latest_run": (lambda: find_latest_run(path), path),
        "load_tokens(source)": (lambda: load_tokens(path, "test", reference.words, cache_dir=folder / "cache"), path),
        "load_tokens(cache_dir)": (lambda: load_tokens(str(folder / "text.txt"), "test", reference.words, cache_dir=path),
                                   path),
        "load_tokens(split)": (lambda: load_tokens(str(folder / "text.txt"), value, reference.words, cache_dir=folder),
                               value),
        "load_tokens(num_proc)": (lambda: load_tokens(str(folder / "text.txt"), "test", reference.words, cache_dir=folder,
                                                      num_proc=_small(value)), value),
        "load_tokens(column)": (lambda: load_tokens(str(reference.root / "rows.jsonl"), "test", reference.words,
                                                    cache_dir=folder, column=value), value),
        "Tokenizer(bytes)": (lambda: Tokenizer(value), value),
        "Tokenizer.train(vocab_size)": (lambda: Tokenizer.train(["the tree"], value), value),
        "Tokenizer.train(texts)": (lambda: Tokenizer.train(value, 300), value),
        "TokenStream.from_text": (lambda: TokenStream.from_text(value, reference.words), value),
        "TokenWindows": (lambda: TokenWindows(TokenStream.from_text("the tree", reference.words), value), value),
        "from_pretrained(device)": (lambda: HBLLForCausalLM.from_pretrained(folder / "model", device=value), value),
        "from_pretrained(revision)": (lambda: HBLLForCausalLM.from_pretrained(folder / "model", revision=value), value),
    }  # fmt: skip
    name = rng.choice(sorted(calls))
    call, given = calls[name]

    def tolerant():
        """As Python's own functions: no path at all is a TypeError, and a file that cannot be written an OSError."""
        try:
            return call()
        except TypeError as error:
            if "PathLike" not in str(error):
                raise
        except OSError:
            if name != "Tokenizer.save":
                raise
        raise ValueError("as Python's own functions have it: give a path")

    return Case(f"{name}: {describe(given)}", tolerant, lambda result: "accepted")


def _small(value):
    return 2 if isinstance(as_whole(value), int) and as_whole(value) > 8 else value


def _furnish(reference: Reference, folder: Path) -> None:
    """Things of every kind, under the names that ``_PATHS`` knows."""
    shutil.copytree(reference.root / "model", folder / "model")
    (folder / "folder").mkdir()
    (folder / "file").write_text("words\n")
    (folder / "text.txt").write_text("the tree reads\n" * 60)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
