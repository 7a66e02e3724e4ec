"""Folders of models: configuration, weights, tokenizer, sums, of language models and classifiers."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hbll_seq import HBLLClassifierConfig, HBLLConfig, HBLLForCausalLM, HBLLForSequenceClassification, Tokenizer
from hbll_seq.utils.integrity import SUMS_NAME

from . import documents, files
from .oracle import Case, Violation
from .reference import PROMPT, Reference, reseal
from .values import describe, hostile

#: what becomes of the folder's sums: left as they were written, written anew over the harmed files, or taken away.
SEALS = ("left", "left", "anew", "away")
#: what a message about a file may name instead of it.
_CONFIGS = (HBLLConfig, HBLLClassifierConfig)
_NAMES = {"config.json": tuple(field.name for kind in _CONFIGS for field in dataclasses.fields(kind)),
          "tokenizer.model": ("tokenizer",)}  # fmt: skip
_TEXTS = ("the tree reads", " a  b\n\tc \r\n", "\ufb01 e\u0301 \U0001f600 \u5b57\u2581x", "XYZ 0123 \x00")
_DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.float8_e4m3fn, torch.int32, torch.bool)


def targets(reference: Reference) -> dict:
    """The targets over these unharmed folders."""
    made = Folders(reference)
    return {"config": made.config, "weights": made.weights, "tokenizer": made.tokenizer, "sums": made.sums,
            "classifier": made.classifier}  # fmt: skip


class Folders:
    """Makes cases of copies of the unharmed folders."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.bytes = {(kind, path.name): path.read_bytes() for kind in ("model", "other", "classifier", "other-classifier")
                      for path in (reference.root / kind).iterdir()}  # fmt: skip

    # -- targets

    def config(self, rng: random.Random, folder: Path) -> Case:
        """config.json of a language model, or the configuration as Python values."""
        if rng.random() < 0.2:
            return self._python_config(rng, HBLLConfig)
        return self._document(rng, folder, "model", HBLLForCausalLM)

    def classifier(self, rng: random.Random, folder: Path) -> Case:
        """The classifier's folder: config.json more often than the rest."""
        choice = rng.random()
        if choice < 0.2:
            return self._python_config(rng, HBLLClassifierConfig)
        if choice < 0.7:
            return self._document(rng, folder, "classifier", HBLLForSequenceClassification)
        return self._file(rng, folder, "classifier", "model.safetensors", HBLLForSequenceClassification)

    def weights(self, rng: random.Random, folder: Path) -> Case:
        """model.safetensors: its bytes, its header, its tensors."""
        if rng.random() < 0.5:
            return self._file(rng, folder, "model", "model.safetensors", HBLLForCausalLM)
        path = self._copy("model", folder) / "model.safetensors"
        what = rng.choice((_harm_header, _harm_tensors))(path, rng)
        return self._loading(rng, path, what, HBLLForCausalLM)

    def tokenizer(self, rng: random.Random, folder: Path) -> Case:
        """tokenizer.model beside a model, or alone."""
        if rng.random() < 0.6:
            return self._file(rng, folder, "model", "tokenizer.model", HBLLForCausalLM)
        path = folder / "tokenizer.model"
        path.write_bytes(self.bytes["model", "tokenizer.model"])
        what = self._harm(path, rng, (self.reference.root / "text.txt").read_bytes())
        return Case(f"tokenizer alone: {what}", lambda: Tokenizer.from_file(path), _lossless, ("tokenizer.model",))

    def sums(self, rng: random.Random, folder: Path) -> Case:
        """SHA256SUMS and the card: the model itself is unharmed, so that nothing but it may come out."""
        kind = rng.choice(("model", "model", "classifier"))
        copy = self._copy(kind, folder)
        name = rng.choice((SUMS_NAME, SUMS_NAME, SUMS_NAME, "README.md"))
        path = copy / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else ["0" * 64 + "  config.json\n"]
        path.write_text("".join(lines))
        if name == SUMS_NAME and rng.random() < 0.5:
            at = rng.randrange(len(lines))
            line = rng.choice(("", "x\n", "0" * 64 + "  config.json\n", "0" * 64 + "  ../x\n", "0" * 64 + "  missing.bin\n",
                               lines[at].upper(),
                               lines[at] * 2, "0" * 64 + " *config.json\n", lines[at].replace("  ", " "),
                               "f" * 70 + "  " + "x" * 300 + "\n"))
            what = f"{name}: {lines[at]!r} is now {line[-40:]!r}"
            path.write_text("".join([*lines[:at], line, *lines[at + 1 :]]))
        else:
            what = f"{name}: {self._harm(path, rng, self.bytes['other', name] if ('other', name) in self.bytes else b'x')}"
        loader = HBLLForCausalLM if kind == "model" else HBLLForSequenceClassification
        return Case(f"{kind}, {what}", lambda: loader.from_pretrained(copy), self._same(kind),
                    (name, "config.json", "model.safetensors", "tokenizer.model"))  # fmt: skip

    # -- making them

    def _python_config(self, rng: random.Random, config_class) -> Case:
        names = [field.name for field in dataclasses.fields(config_class)]
        chosen = {rng.choice(names): hostile(rng) for _ in range(rng.choice((1, 1, 2)))}
        what = f"{config_class.__name__}({', '.join(f'{name}={describe(value)}' for name, value in chosen.items())})"

        def judge(config) -> str:
            try:
                again = config_class.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
            except (TypeError, ValueError) as error:
                raise Violation("accepted in silence",
                                f"{what}: it cannot be written to JSON and read again: {error}") from None
            if again != config:
                raise Violation("changed result", f"{what}: JSON gives another configuration")
            return "accepted"

        return Case(what, lambda: config_class(**chosen), judge, tuple(chosen))

    def _copy(self, kind: str, folder: Path) -> Path:
        return Path(shutil.copytree(self.reference.root / kind, folder / kind))

    def _harm(self, path: Path, rng: random.Random, other: bytes) -> str:
        if rng.random() < 0.15:
            return files.harm_place(path, rng)
        data, what = files.harm_bytes(path.read_bytes(), rng, other)
        path.write_bytes(data)
        return what

    def _document(self, rng: random.Random, folder: Path, kind: str, loader) -> Case:
        """config.json harmed as a document, or as a file."""
        if rng.random() < 0.3:
            return self._file(rng, folder, kind, "config.json", loader)
        path = self._copy(kind, folder) / "config.json"
        text, what = documents.harm_json(json.loads(self.bytes[kind, "config.json"]), rng)
        path.write_bytes(documents.to_bytes(text, rng))
        return self._loading(rng, path, what, loader)

    def _file(self, rng: random.Random, folder: Path, kind: str, name: str, loader) -> Case:
        path = self._copy(kind, folder) / name
        other = self.bytes[rng.choice((("other" if kind == "model" else "other-classifier", name), (kind, "README.md")))]
        return self._loading(rng, path, self._harm(path, rng, other), loader)

    def _loading(self, rng: random.Random, path: Path, what: str, loader) -> Case:
        """Load the folder of a harmed file, with its sums left, written anew or taken away."""
        kind, seal = path.parent.name, rng.choice(SEALS)
        if seal == "anew":
            reseal(path.parent)
        elif seal == "away":
            (path.parent / SUMS_NAME).unlink(missing_ok=True)
        judge = self._same(kind) if seal == "left" else self._usable(kind)
        names = (path.name, *_NAMES.get(path.name, ()))
        return Case(f"{path.name}, sums {seal}: {what}", lambda: loader.from_pretrained(path.parent), judge, names)

    # -- judging them

    def _same(self, kind: str):
        """The model has to be the unharmed one."""

        def judge(model) -> str:
            unharmed = self.reference.language_model if kind == "model" else self.reference.sequence_classifier
            if model.config != unharmed.config:
                raise Violation("changed result", f"another configuration: {_difference(model.config, unharmed.config)}")
            own, other = model.state_dict(), unharmed.state_dict()
            if own.keys() != other.keys() or any(not torch.equal(own[name], other[name]) for name in own):
                raise Violation("changed result", "other weights")
            if kind == "model" and (model.tokenizer is None or model.tokenizer.fingerprint != unharmed.tokenizer.fingerprint):
                raise Violation("changed result", "another tokenizer, or none")
            return "equal"

        return judge

    def _usable(self, kind: str):
        """No sums tell of the harm: what was loaded has to work, in the shapes that it says it has."""

        def judge(model) -> str:
            with torch.no_grad():
                if kind == "model":
                    shape, expected = model(torch.tensor([[1, 2, 0]])).logits.shape, (1, 3, model.config.vocab_size)
                    if model.tokenizer is not None:
                        model.generate(PROMPT, max_new_tokens=2, temperature=0.5, seed=0, truncate_prompt=True)
                else:
                    shape, expected = model(torch.zeros(2, model.config.n_inputs)).shape, (2, model.config.n_classes)
            if tuple(shape) != expected:
                raise Violation("changed result", f"results of shape {tuple(shape)} instead of {expected}")
            return "accepted"

        return judge


def _difference(one, other) -> str:
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return ", ".join(f"{name}={a!r} was {b!r}" for name, a, b in pairs if a != b)[:300]


def _lossless(tokenizer: Tokenizer) -> str:
    for text in _TEXTS:
        if (found := tokenizer.decode(tokenizer.encode(text))) != text:
            raise Violation("changed result", f"{text!r} comes back as {found!r}")
    return "accepted"


def _harm_header(path: Path, rng: random.Random) -> str:
    """The JSON at the start of a safetensors file, or its length."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    if rng.random() < 0.2:
        size = rng.choice((0, 1, size - 1, size + 1, len(data), 100_000_000, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", size) + data[8:])
        return f"header of {size} bytes"
    header = json.loads(data[8 : 8 + size])
    for name in [name for name in header if rng.random() < 0.7][: len(header) - 2]:
        header[name + "."[:0]] = header.pop(name)  # another order, so that every tensor is met first at times
    text, what = documents.harm_json(header, rng)
    new = documents.to_bytes(text, rng)
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])
    return f"header: {what}"


def _harm_tensors(path: Path, rng: random.Random) -> str:
    """A sound file of other tensors."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    kind = rng.choice(("one dtype", "all dtypes", "missing", "extra", "shape", "NaN", "inf", "transposed", "huge", "zero",
                       "renamed"))
    dtype = rng.choice(_DTYPES)
    if kind == "all dtypes":
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors[rng.choice(("x", "", "blocks.9.x", "__class__", "x" * 3000, "\u001b[2J\n"))] = torch.zeros(2)
    elif kind == "renamed":
        tensors[name + "_"] = tensors.pop(name)
    elif kind in ("NaN", "inf", "huge"):
        tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = {"NaN": float("nan"), "inf": -float("inf"),
                                                                        "huge": 3e38}[kind]
    else:
        tensor = tensors[name]
        tensors[name] = {"one dtype": lambda: tensor.to(dtype),
                         "shape": lambda: tensor.reshape(-1)[: rng.randrange(tensor.numel())].clone(),
                         "transposed": lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor[None],
                         "zero": lambda: tensor * 0}[kind]()
    try:
        save_file(tensors, path, metadata=rng.choice((None, {"format": "pt"}, {"format": "tf"}, {"x": "y" * 3000})))
    except Exception as error:  # a type that the format has no name for
        return f"{kind} {name} {dtype}, not written ({type(error).__name__})"
    return f"{kind} {name}" + f" {dtype}" * ("dtype" in kind)
