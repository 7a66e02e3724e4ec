"""README.md of a saved model: what it is, how to load it, perplexity by path, data and settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from hbll_seq.tree.topology import path_text
from hbll_seq.utils.reading import quote
from hbll_seq.utils.tables import shown_per_word

LIBRARY = "hbll_seq"
MARKER = "<!-- Written by hbll_seq. Remove this line to keep your edits when a model is saved here again. -->"
#: metadata that the Hub reads from the card's header.
HEADER_KEYS = ("license", "datasets", "language", "model_name")
#: characters of one value, of those that a card shows.
MAX_CELL = 20_000

_CARD = """\
---
{header}
---
{marker}

# {title}

{about} The architecture is that of
*Breaking chains with trees: Deep learning with O(log N) parallel time complexity*
([arXiv 2606.21497](https://arxiv.org/abs/2606.21497)); how this model was trained is listed below.

## How to load it

```python
from hbll_seq import {architecture}

model = {architecture}.from_pretrained({location})
{usage}
```

{elsewhere}{sections}"""
#: section of a model that transformers can load; what its example loads from is put in later
AUTO_USAGE = """\
## In transformers

With hbll_seq and its extra `[hf]` installed:

```python
import hbll_seq.integrations.transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", depth={depth})
```

A repository that `push_to_hub` made also takes `trust_remote_code=True` in place of the first import.
The code in it is that import and no more, so that hbll_seq has to be installed all the same.

"""
_POINTER = """\
\"\"\"What transformers runs with trust_remote_code=True: the classes are those of hbll_seq, with its extra [hf].\"\"\"

from hbll_seq.integrations.transformers import {names}

__all__ = [{quoted}]
"""


_PICTURES = "## Pictures"


class CardText(NamedTuple):
    """What a card says of one kind of model.

    pipeline_tag: the Hub's name of the task; None where it has none.
    title: heading, where ``model_name`` gives none.
    about: first paragraph.
    usage: Python lines that use ``model``.
    elsewhere: a section on other libraries that load it.
    """

    pipeline_tag: str | None
    title: str
    about: str
    usage: str
    elsewhere: str = ""


def model_card(model: Any, metadata: dict[str, Any]) -> str:
    """The card of ``model``, filled from its ``card_text()`` and from ``metadata`` (the keywords of ``save_pretrained``);
    "." is its location."""
    text = model.card_text()
    header = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=text.pipeline_tag,
        tags=["hbll"],
        **{key: metadata[key] for key in HEADER_KEYS if key in metadata},
    )
    sections = []
    if rows := metadata.get("perplexity"):
        tables = {f"Of the {name} split:\n\n": rows[name] for name in rows} if isinstance(rows, dict) else {"": rows}
        sections.append("## Perplexity by path\n\n" + "\n\n".join(name + _table(part) for name, part in tables.items()))
    if pictures := metadata.get("pictures"):
        images = [f"![{name.rpartition('.')[0].replace('_', ' ')}]({name})" for name in pictures]
        sections.append("\n\n".join([_PICTURES, *images]))
    training = []
    if trained := getattr(model.config, "trained_depths", ""):
        training.append(f"Trained paths: {trained}.")
    if "data" in metadata:
        training.append(f"Data: {_cell(metadata['data'])}")
    if settings := metadata.get("settings"):
        training.append(_table([{"setting": key, "value": value} for key, value in settings.items()]))
    shown = {"data", "settings", "perplexity", "pictures", *HEADER_KEYS}
    if more := {key: value for key, value in metadata.items() if key not in shown}:
        training.append(_table([{"": key.replace("_", " "), "value": value} for key, value in more.items()]))
    if training:
        sections.append("## Training\n\n" + "\n\n".join(training))
    config = [{"key": key, "value": value} for key, value in model.config.to_dict().items()]
    sections.append(f"## Configuration\n\n{_table(config)}")
    return _CARD.format(
        header=header.to_yaml(),
        marker=MARKER,
        title=metadata.get("model_name", text.title),
        about=text.about,
        architecture=type(model).__name__,
        location='"."',
        usage=text.usage,
        elsewhere=text.elsewhere,
        sections="\n\n".join(sections) + "\n",
    )


def check_metadata(metadata: dict[str, Any]) -> None:
    """Raises ValueError for metadata that the card's header or tables cannot take."""
    for key in HEADER_KEYS:
        value = metadata.get(key, "")
        texts = value if isinstance(value, (list, tuple)) and key != "model_name" else [value]
        if not all(isinstance(text, str) and len(text) <= MAX_CELL for text in texts) or len(texts) > 100:
            many = "" if key == "model_name" else " or a list of them"
            raise ValueError(f"{key}={quote(value)}: must be a text{many}, which goes to the card's header")
    if not isinstance(settings := metadata.get("settings", {}), dict):
        raise ValueError(f"settings={quote(settings)}: must be a dictionary, name -> value")
    perplexity = metadata.get("perplexity", [])
    for rows in perplexity.values() if isinstance(perplexity, dict) else [perplexity]:
        if not isinstance(rows, (list, tuple)) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(
                f"perplexity={quote(perplexity)}: must be a list of dictionaries, as evaluate_paths makes them, or such a "
                "list for each of validation and test"
            )
    pictures = metadata.get("pictures", [])
    if not isinstance(pictures, (list, tuple)) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]{1,100}\.png", name) for name in pictures
    ):
        raise ValueError(f"pictures={quote(pictures)}: must be a list of names of .png files beside the model")


def is_model_card(text: str) -> bool:
    """Whether the text is a model card of this library, edited by hand or not."""
    header = re.match(r"---\r?\n(.*?)\n---", text, flags=re.DOTALL)
    return header is not None and f"library_name: {LIBRARY}" in header.group(1)


def may_overwrite(text: str) -> bool:
    """Whether the text is a model card that nobody has claimed by removing the marker."""
    return is_model_card(text) and MARKER in text


def with_location(card: str, location: str) -> str:
    """The card, with ``location`` as the place that its examples load from."""
    return re.sub(r'from_pretrained\("[^"\n]*"(?=[,)])', lambda _: f"from_pretrained({json.dumps(location)}", card)


def code_pointer(names: Iterable[str]) -> str:
    """The module by which transformers finds these classes of ``hbll_seq.integrations.transformers``."""
    names = sorted(names)
    return _POINTER.format(names=", ".join(names), quoted=", ".join(json.dumps(name) for name in names))


def with_pictures_of(card: str, folder: Path) -> str:
    """The card, without the pictures that ``folder`` does not hold: a copy of the model may leave them behind."""
    images = re.compile(r"\n\n!\[[^\]\n]*\]\(([\w.-]+\.png)\)")
    card = images.sub(lambda image: image[0] if (folder / image[1]).is_file() else "", card)
    return card if re.search(rf"{_PICTURES}\n\n!", card) else card.replace(f"\n\n{_PICTURES}\n", "\n")


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a column for each key that a row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_cell(str(column).replace("_", " ")) for column in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(column, ""), column) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any, column: str = "") -> str:
    if column == "path" and isinstance(value, (list, tuple)):  # (4, 6) -> 0-4-6-head
        value = path_text(value)
    if column == "word_perplexity" and isinstance(value, float) and shown_per_word(value) is None:
        return "-"
    if isinstance(value, float) and column in ("loss", "bits_per_byte", "perplexity", "word_perplexity"):
        return f"{value:.4f}" if column in ("loss", "bits_per_byte") else f"{value:.2f}"
    if isinstance(value, str) and os.path.isabs(value):  # paths of this machine do not belong on a card
        value = os.path.basename(value.rstrip(os.sep))
    try:
        text = str(value)
    except Exception:  # a whole number with thousands of digits, or a foreign __str__
        text = quote(value)
    text = text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."
    return text.replace("|", "\\|").replace("\n", " ").replace("\r", " ")
