"""Our language model as a model of transformers: its generate, its caches, its pipelines, and our folders.

Shapes: B rows of a batch, T tokens of a call, C width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from hbll_seq.integrations.transformers_cache import BlocksOverCache, check_mask, has_gap
from hbll_seq.integrations.transformers_config import HBLLTransformersConfig
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub_source import as_source, check_hub_options, find_folder
from hbll_seq.models.model_files import TOKENIZER_NAME, WEIGHTS_NAME, ModelFiles, called
from hbll_seq.utils.checks import as_token_ids
from hbll_seq.utils.migration import MODEL_TENSORS
from hbll_seq.utils.reading import quote
from hbll_seq.utils.tensors import listing

GENERATION_NAME = "generation_config.json"
#: arguments of transformers' save_pretrained that mean nothing for one file of safetensors
_OF_NO_MEANING = frozenset(
    {"save_function", "max_shard_size", "safe_serialization", "variant", "token", "save_peft_format", "save_original_format"}
)


class HBLLTransformersForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`hbll_seq.HBLLForCausalLM` that transformers can use; it is ``model`` inside.

    Both read and write the same folders, and have the same logits. The model runs along one path, all blocks at first:
    ``from_pretrained(folder, depth=3)``, :meth:`set_depth`, or ``generate(..., depth=3)``.

    Args:
        config: shape of the model, and the path.
        model: the model to wrap, of that shape; None makes a new one.

    Raises:
        ValueError: the path is not possible in this tree.
    """

    config_class = HBLLTransformersConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _tied_weights_keys = {"model.head.projection.weight": "model.embed.weight"}
    _no_split_modules = ["TransformerBlock", "RecurrentBlock"]
    _supports_sdpa = True

    def __init__(self, config: HBLLTransformersConfig, model: HBLLForCausalLM | None = None):
        _ = config.run_path  # which raises, before a model is made
        super().__init__(config)
        self.model = HBLLForCausalLM(config.hbll) if model is None else model
        if not isinstance(config.depth, str):
            self.model.resolve_path(config.depth, config.path)
        self._is_stateful = config.hbll.has_recurrence  # a state cannot be taken back, as assisted generation would have to
        self.post_init()

    @classmethod
    def wrap(
        cls, model: HBLLForCausalLM, depth: int | str | None = None, path: Sequence[int] | None = None
    ) -> HBLLTransformersForCausalLM:
        """A model of hbll_seq for transformers; the weights are shared. Raises ValueError for an impossible path."""
        end = None if model.tokenizer is None else model.tokenizer.eos_id
        config = HBLLTransformersConfig(**model.config.to_dict(), eos_token_id=end, dtype=model.embed.weight.dtype)
        wrapped = cls(config, model).train(model.training)
        wrapped.set_depth(depth, path)
        return wrapped

    # ------------------------------------------------------------------------------------------------------- depth

    @property
    def path(self) -> tuple[int, ...]:
        """The block numbers that are run. Raises ValueError where the model cannot look up ``"best"``."""
        if isinstance(self.config.depth, str):
            self.set_depth(self.config.depth)
        return self.config.run_path

    def set_depth(self, depth: int | str | None = None, path: Sequence[int] | None = None) -> None:
        """Run that many blocks from now on, or those of ``path``; without arguments all.

        ``"best"`` and ``"fast"`` are looked up in what is stored with the model, see :meth:`hbll_seq.HBLLForCausalLM.paths`.
        A cache that was filled before belongs to the path before.

        Raises:
            ValueError: both are given, or the one given is not possible in this tree.
        """
        self.config.depth, self.config.path = None, list(self.model.resolve_path(depth, path))

    def _at(self, depth: int | str | None, path: Sequence[int] | None) -> HBLLTransformersForCausalLM:
        """This model for one call: the same modules with a configuration of its own, since other threads may ask for other
        depths meanwhile."""
        if depth is None and path is None:
            return self
        if "forward" in vars(self):  # as accelerate's hooks put it there: it would run the path of the whole model
            raise ValueError(f"depth={quote(depth)}, path={quote(path)} with a model whose forward was replaced: call "
                             "set_depth before generate")
        twin = copy.copy(self)
        twin.config = copy.copy(self.config)
        twin.set_depth(depth, path)
        return twin

    # ----------------------------------------------------------------------------------------------------- running

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """The network along the path.

        Args:
            input_ids: [B, T]; or ``inputs_embeds`` [B, T, C], as ``get_input_embeddings()`` makes them.
            attention_mask: [B, tokens in the cache + T], 0 for padding. Recurrent blocks take padding on the left only, once
                there is a cache.
            cache: of transformers, filled along this path; ``past_key_values`` is its old name.
            labels: [B, T], as the ids, shifted inside; -100 is not scored.
            use_cache: make a cache where none is given.
            logits_to_keep: only the last so many positions, or those of these numbers; 0 is all.
            output_hidden_states: also return the state before and after each block.
            options: ``num_items_in_batch``, by which the summed loss is divided; positions are not needed, since rotary
                ones are relative.

        Raises:
            ValueError: an id is outside the vocabulary, shapes do not agree, or the cache is another path's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give exactly one of them")
        if inputs_embeds is None:
            state = self.model.embed(as_token_ids("input_ids", input_ids, self.config.vocab_size, self.model, empty=True))
        else:
            state = inputs_embeds
        cache, path = past_key_values if cache is None else cache, self.path
        mask = check_mask(attention_mask, tuple(state.shape[:2]))
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not (has_gap(mask) and self._is_stateful):
            cache = DynamicCache(config=self.config)
        blocks, states = BlocksOverCache(self.model.blocks, path, cache, mask), [state]
        for i in range(len(path)):
            states.append(blocks.run(i, states[-1]))
            if not output_hidden_states:
                del states[0]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.model.read_out(states[-1] if isinstance(kept, int) else states[-1][:, kept], path)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        hidden = tuple(states) if output_hidden_states else None
        return CausalLMOutputWithPast(loss, logits, cache, hidden)

    def generate(
        self, *inputs: Any, depth: int | str | None = None, path: Sequence[int] | None = None, **options: Any
    ) -> Any:
        """transformers' ``generate``, along the path that ``depth`` or ``path`` names; without them along the model's own.

        Ids that the model's tokenizer does not have (a vocabulary may be padded) are never drawn. See
        ``transformers.GenerationMixin.generate`` for all else.

        Raises:
            ValueError: the path is not possible; or as transformers.
        """
        tokenizer = self.model.tokenizer
        if tokenizer is not None and tokenizer.vocab_size < self.config.vocab_size:
            beyond = list(range(tokenizer.vocab_size, self.config.vocab_size))
            suppress = SuppressTokensLogitsProcessor(beyond, device=str(self.device))
            options["logits_processor"] = LogitsProcessorList([*(options.get("logits_processor") or ()), suppress])
        along = self._at(depth, path)
        self.model.warn_if_untrained(along.path)
        return super(HBLLTransformersForCausalLM, along).generate(*inputs, **options)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **options: Any) -> Tensor | None:
        """The padding mask as it is: the blocks' own masks are made of it, for every kind of cache."""
        return attention_mask

    def _valid_auto_compile_criteria(self, *inputs: Any) -> bool:
        return False  # the masks grow with the text, and would be compiled anew at every token

    # ----------------------------------------------------------------------------------------------------- weights

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: our modules fill their own weights."""

    def get_input_embeddings(self) -> nn.Module:
        """Token ids [B, T] -> states [B, T, C]."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """The projection onto the vocabulary."""
        return self.model.head.projection

    def resize_token_embeddings(self, *inputs: Any, **options: Any) -> nn.Module:
        """Raises ValueError: the vocabulary belongs to the trained model."""
        raise ValueError(
            f"resize_token_embeddings: vocab_size={self.config.vocab_size} is fixed; make a model of a config with another "
            "vocab_size, which may be larger than the tokenizer's, and copy the weights into it"
        )

    # ----------------------------------------------------------------------------------------------------- folders

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        **options: Any,
    ) -> HBLLTransformersForCausalLM:
        """The model of a folder of ours or of the Hub, loaded by transformers, with its tokenizer as ``model.tokenizer``.

        Args:
            pretrained_model_name_or_path, revision, token, cache_dir, local_files_only, subfolder: see
                :meth:`hbll_seq.HBLLForCausalLM.from_pretrained`.
            model_args, options: of transformers; ``depth`` and ``path``.

        Raises:
            ValueError: there is no such model, or the files do not hold exactly its weights.
        """
        source = as_source(pretrained_model_name_or_path)
        check_hub_options(token=token, local_files_only=local_files_only, cache_dir=cache_dir, subfolder=subfolder or None)
        if os.path.isdir(source):
            revision = None  # transformers' own calls name one for folders too
        hub = (revision, token, cache_dir, local_files_only)
        files = ModelFiles(find_folder(source, *hub, subfolder or None, [GENERATION_NAME]), source)
        files.check(WEIGHTS_NAME)
        with_info = options.pop("output_loading_info", False)
        options = {"key_mapping": {f"^{old}": new for old, new in MODEL_TENSORS.items()}, "use_safetensors": True, **options}
        model, info = super().from_pretrained(files.folder, *model_args, output_loading_info=True, **options)
        for kind, words in (("missing_keys", "lacks"), ("unexpected_keys", "holds"), ("mismatched_keys", "has misshapen")):
            if names := sorted(str(name) for name in info.get(kind) or ()):
                raise ValueError(f"{called(source)}: {WEIGHTS_NAME} {words} {listing(names)}; use the config.json that was "
                                 "saved with these weights, or load an intact copy")
        model.model.adopt(files)
        _ = model.path  # looked up where it is a word
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that hbll_seq and transformers load; see :meth:`hbll_seq.HBLLForCausalLM.save_pretrained`.

        A tokenizer.model that lies there already is kept, where the model has none of its own. The path is not stored.

        Args:
            save_directory: the folder.
            is_main_process: False writes nothing.
            state_dict: refused; the model's own weights are written.
            push_to_hub: refused.
            options: metadata for the model card. Others of transformers are dropped: there is one file of weights.

        Raises:
            ValueError: as hbll_seq's own, or an option is refused.
        """
        if state_dict is not None or push_to_hub is not False:
            name = "push_to_hub" if state_dict is None else "state_dict"
            remedy = "call model.push_to_hub(repo_id)" if state_dict is None else "load it into the model first"
            raise ValueError(f"{name}={quote(push_to_hub) if state_dict is None else '...'}: not known here; {remedy}")
        if not is_main_process:
            return
        metadata = {name: value for name, value in options.items() if name not in _OF_NO_MEANING}
        with self._tokenizer_of(Path(save_directory).expanduser()):
            self.model.save_pretrained(save_directory, **metadata)
        self.generation_config.save_pretrained(Path(save_directory).expanduser())

    @contextlib.contextmanager
    def _tokenizer_of(self, folder: Path) -> Iterator[None]:
        """Inside, the model has the tokenizer that lies in a folder, unless it has its own."""
        own = self.model.tokenizer
        if own is None and (folder / TOKENIZER_NAME).is_file():
            self.model.tokenizer = ModelFiles(folder, str(folder)).tokenizer(self.config.vocab_size)
        try:
            yield
        finally:
            self.model.tokenizer = own

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """See :meth:`hbll_seq.HBLLForCausalLM.push_to_hub`: the address of the commit. Raises ValueError as it does."""
        return self.model.push_to_hub(repo_id, **options)
