"""Harm done to JSON and YAML documents: their keys, values, types, nesting and encoding."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

#: JSON texts of values that few readers expect.
JSON_VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "3", "7", "320", "60000000", "1000000000", "2147483648",
    "9223372036854775808",
    "18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000, "-1" + "0" * 30, "0.5", "1.0", "1e3", "1e308", "1e999",
    "-1e999",
    "NaN", "Infinity", "-Infinity", "-0", "-0.0", "1e-400", '""', '"x"', '"2"', '"true"', '"../../etc/passwd"', '"/dev/zero"',
    '"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"\\n\\n"', '"' + "x" * 3000 + '"', '"' + "\u00e9\u5b57" * 300 + '"', "[]",
    "{}",
    "[1]", "[null]", '["gru"]', '["gru","gru","gru"]', '{"a":1}', "[" * 100000, "[" * 90000 + "]" * 90000,
    '{"a":' * 20000 + "1" + "}" * 20000, "[" + "1," * 20000 + "1]", "01", "+1", ".5", "0x10", "'a'", "",
)  # fmt: skip
#: YAML texts of values.
YAML_VALUES = (
    "~", "yes", "no", "on", "null", "''", "0", "-1", "1", "2", "0o17", "0x1F", "1_000", "1e3", "1e-4", ".inf", "-.inf",
    ".nan", "1e999",
    "9007199254740993", "1" + "0" * 400, "1" + "0" * 5000, "2020-01-01", "2001-99-99", "12:30:45",
    "!!python/object/apply:os.getcwd []",
    "!!python/name:os.system", "!!binary aGk=", "!!binary @@", "!!int x", "!!float x", "!!bool 3", "!!timestamp x",
    "!!set {a}", "!!omap [a: 1]",
    "!unknown x", "[]", "{}", "[1, 2]", "[4, 6, 7]", "{a: 1}", "{[1]: 2}", "{{a: b}: c}", "&x [*x]", "*missing", "<<",
    "[" * 50000, "{a: " * 3000,
    '"\\x00"', '"\\ud800"', '"\\e[2J"', "'" + "x" * 3000 + "'", "|\n  a\n  b", ">\n a", "@at", "`tick", "%x", "a: b: c",
    "- x", "? y", "\tx",
    "[a, b", "'open", "gru", "gru,transformer,gru", "full", "'4,6,7'", "../../x", "/dev/zero", "\u00e9\u5b57", "auto", "none",
    "train", "\x07",
)  # fmt: skip
_MARK = "@@RAW {}@@"


def harm_json(document: Any, rng: random.Random) -> tuple[str, str]:
    """A JSON document with one to three harms, as text, and what they were in words."""
    document, raw, words = copy.deepcopy(document), [], []
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _harm(document, rng, raw, words)
    text = json.dumps(document, indent=rng.choice((None, 1, 2)))
    for index, value in enumerate(raw):
        text = text.replace(json.dumps(_MARK.format(index)), value, 1)
    return _harm_text(text, rng, words), ", ".join(words)


def _harm(document: Any, rng: random.Random, raw: list[str], words: list[str]) -> Any:
    """The document with one harm; raw texts stand in it as marks."""
    places = _places(document)
    container, key = rng.choice(places) if places and rng.random() > 0.05 else (None, None)
    value = rng.choice(JSON_VALUES)
    raw.append(value)
    mark = _MARK.format(len(raw) - 1)
    if container is None:
        words.append(f"all of it is {value[:30]}")
        return mark
    kind = rng.choice(("value", "value", "value", "value", "delete", "new key", "rename", "wrap", "twice", "swap", "near"))
    words.append(f"{kind} {str(key)[:40]}" + f"={value[:30]}" * (kind in ("value", "twice")))
    if kind == "delete":
        del container[key]
    elif kind == "wrap":
        container[key] = [container[key]]
    elif kind == "near":
        container[key] = _near(container[key], rng)
    elif kind == "swap":
        other, where = rng.choice(places)
        container[key], other[where] = copy.deepcopy(other[where]), copy.deepcopy(container[key])
    elif kind == "value" or not isinstance(container, dict):
        container[key] = mark
    elif kind == "new key":
        container[rng.choice(("x", "", "../x", "__class__", "x" * 400, "\u001b[2J", "N_EMBD", "n_embd "))] = mark
    elif kind == "rename":
        container[f"{key}_"] = container.pop(key)
    else:  # the second of two equal keys: json.dumps writes no such thing, but keeps an order
        words[-1] += " (two keys)"
        raw[-1] = f'{value or "1"}, {json.dumps(key)}: {json.dumps(container[key])}'
        container[key] = mark
    return document


def _near(value: Any, rng: random.Random) -> Any:
    """Another valid value, likely: the harm that nothing but a sum can tell."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2, value))
    if isinstance(value, float):
        return value * rng.choice((0.5, 2, -1)) + rng.choice((0.0, 1e-3))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), "rmsnorm", "layernorm", "prefix", "spine", "depth", "gru"))
    return value


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of the values in it; of long lists the first ones."""
    found, open_ = [], [document]
    while open_:
        container = open_.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container[:5]) if isinstance(container,
                                                                                                             list) else ()
        for key, value in items:
            found.append((container, key))
            open_.append(value)
    return found


def _harm_text(text: str, rng: random.Random, words: list[str]) -> str:
    """Now and then a harm to the text as such."""
    if rng.random() > 0.15:
        return text
    name = rng.choice(list(_TEXTS))
    words.append(name)
    return _TEXTS[name](text)


_TEXTS = {
    "a BOM": lambda text: "\ufeff" + text,
    "garbage behind": lambda text: text + "]",
    "a second document": lambda text: text + "\n" + text,
    "a comment": lambda text: "// x\n" + text,
    "a NUL behind": lambda text: text + "\0",
    "cut": lambda text: text[: len(text) // 2],
    "a comma": lambda text: text[:-1] + "," + text[-1:],
    "blanks": lambda text: " " * 3000 + text,
    "form feed": lambda text: "\f" + text,
}
#: how a text is turned into bytes; the first one is what every reader expects.
ENCODINGS = ("utf-8",) * 12 + ("utf-16", "utf-8-sig", "utf-32", "latin-1")


def to_bytes(text: str, rng: random.Random) -> bytes:
    """The text in UTF-8, or now and then in another encoding."""
    return text.encode(rng.choice(ENCODINGS), "replace")


# ---------------------------------------------------------------------------------------------------- YAML

_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi"))
_DOCUMENTS = (
    _BOMB, "", "\n", "---\n", "--- a\n--- b\n", "- 1\n- 2\n", "just words\n", "42\n", "[" * 100000, "{" * 5000, "a: " * 3000,
    "%YAML 9.9\n---\na: 1\n",
    "%TAG ! x\n---\n!a b\n", "&a [*a]\n", "a: &a {<<: *a}\n", "? [a, b]\n: 1\n", "? {a: b}\n: 1\n",
    "!!python/object/new:os.system [echo]\n", "\0",
    "a: 'open\n", "a: |\n" + "  x\n" * 3000, "\t- x\n", "1: 2\n", "~: 1\n", "true: 1\n", "2020-01-01: 1\n", "- " * 3000,
    "n_embd: 8\nn_embd: 16\n",
)  # fmt: skip


def harm_yaml(text: str, rng: random.Random) -> tuple[str, str]:
    """Lines of ``key: value`` with one to three harms, and what they were in words."""
    if rng.random() < 0.15:
        document = rng.choice(_DOCUMENTS)
        return document, f"all of it is {document[:40]!r}"
    lines, words = text.splitlines(), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, value = rng.randrange(len(lines)), rng.choice(YAML_VALUES)
        key = lines[at].split(":")[0]
        kind = rng.choice(("value", "value", "value", "value", "delete", "new key", "rename", "twice", "indent", "cut",
                           "merge", "foreign"))
        words.append(f"{kind} {key}" + f"={value[:30]!r}" * (kind in ("value", "new key", "twice")))
        lines[at : at + 1] = {
            "value": [f"{key}: {value}"], "delete": [], "new key": [lines[at], f"x{key}: {value}"],
            "rename": [lines[at].upper()],
            "twice": [lines[at], f"{key}: {value}"], "indent": ["   " + lines[at]], "cut": [lines[at][: len(lines[at]) // 2]],
            "merge": [lines[at], "<<: {n_embd: 7}"], "foreign": [lines[at],
                                                                 rng.choice(("include: x", "data: a/b/c/d", "path: 4,6,7"))],
        }[kind]  # fmt: skip
        lines = lines or [""]
    return _harm_text("\n".join(lines) + "\n", rng, words), ", ".join(words)
