"""Our tokenizer as one of transformers: the same ids for every text, and the same text for all ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.models.model_files import TOKENIZER_NAME
from hbll_seq.utils.reading import quote


class HBLLTokenizer(PreTrainedTokenizer):
    """A slow tokenizer around :class:`hbll_seq.Tokenizer`; a fast one could not promise the same ids.

    No token is added to a text, and none is read out of it: a text that holds ``<|endoftext|>`` is that text. Batches are
    padded on the left with the end-of-text token, as generation needs it. Decoding keeps every blank; special tokens are
    shown by their names, or with ``skip_special_tokens=True`` left out, as hbll_seq itself does.

    Args:
        vocab_file: tokenizer.model.
        options: of transformers.

    Raises:
        ValueError: the file is no usable tokenizer, or a token is to be added: the vocabulary is the model's.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_NAME}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | os.PathLike[str] | None = None, **options: Any):
        if vocab_file is None:
            raise ValueError(f"vocab_file=None: this tokenizer needs {TOKENIZER_NAME}, which this folder does not have; give "
                             "one that holds it")
        self.hbll = Tokenizer.from_file(vocab_file)
        self._pieces = [self.hbll.piece(i) for i in range(self.hbll.vocab_size)]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        end = self._pieces[self.hbll.eos_id]
        usual = {"eos_token": end, "pad_token": end, "padding_side": "left", "clean_up_tokenization_spaces": False}
        super().__init__(**{**usual, **options})

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.hbll.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return dict(self._ids)

    def tokenize(self, text: str, **options: Any) -> list[str]:
        """The pieces of a text, whatever it holds. Raises ValueError at a lone surrogate."""
        return [self._pieces[i] for i in self.hbll.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._ids:
            raise ValueError(f"there is no token {quote(token)} in this vocabulary; encode a text to see which there are")
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._pieces):
            raise ValueError(f"id {index} is outside the vocabulary; ids are 0 .. {len(self._pieces) - 1}")
        return self._pieces[index]

    def _add_tokens(self, new_tokens: list, special_tokens: bool = False) -> int:
        if unknown := [str(token) for token in new_tokens or () if str(token) not in self._ids]:
            raise ValueError(f"token {quote(unknown[0])} cannot be added: the model knows {len(self._ids)} tokens, no more; "
                             "train a model with a tokenizer that has it")
        return super()._add_tokens(new_tokens, special_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Pieces -> text, special ones left out."""
        return self.hbll.decode([self._convert_token_to_id(token) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **options: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if skip_special_tokens:
            return self.hbll.decode(ids)
        text, run = [], []
        for i in ids:
            if self.hbll.is_special(i):
                text += [self.hbll.decode(run), self._pieces[i]]
                run = []
            else:
                run.append(i)
        return "".join([*text, self.hbll.decode(run)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write tokenizer.model. Raises OSError where it cannot be written."""
        name = f"{filename_prefix}-{TOKENIZER_NAME}" if filename_prefix else TOKENIZER_NAME
        self.hbll.save(Path(save_directory) / name)
        return (str(Path(save_directory) / name),)
