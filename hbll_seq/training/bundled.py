"""The bundled model beside the one that was just trained: what more training gives, in one line."""

from __future__ import annotations

from tqdm import tqdm

from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import evaluate_paths
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.hub_source import package_folder
from hbll_seq.training.settings import TrainingSettings

#: batches that are enough for a figure of two digits
_BATCHES = 25


def bundled_model() -> HBLLForCausalLM | None:
    """The model that the package brings along, None where this installation has none."""
    folder = package_folder()  # not its name: the folder of work may hold something that is called so
    if not folder.is_dir():
        return None
    try:
        return HBLLForCausalLM.from_pretrained(folder)
    except ValueError:  # a run does not fail because another model is damaged
        return None


def show_bundled(model: HBLLForCausalLM, test: TokenWindows, prompt: str, settings: TrainingSettings) -> None:
    """Print the bundled model's perplexity on the beginning of ``test``, on how much of it, and its text after ``prompt``;
    nothing where this installation has no bundled model, or ``model`` reads text in another tokenizer."""
    bundled = bundled_model()
    tokenizers = [found.tokenizer and found.tokenizer.fingerprint for found in (bundled or model, model)]
    if bundled is None or len(set(tokenizers)) > 1:
        return
    bundled = bundled.to(model.embed.weight.device, model.embed.weight.dtype)
    path = bundled.resolve_path()
    limit = min(_BATCHES, settings.final_eval_batches or _BATCHES)
    (row,) = evaluate_paths(bundled, test, {"bundled": path}, batch_size=settings.eval_batch_size, max_batches=limit)
    text = bundled.generate(prompt, path=path, max_new_tokens=settings.sample_tokens, seed=settings.seed,
                            truncate_prompt=True)
    n_all, n_read = test.stream.n_tokens - 1, row["tokens"]  # its card's figure is of all, in windows of its own context
    part = "the" if n_read == n_all else f"the first {n_read:,} tokens of the"
    tqdm.write(f"the bundled model (trained for hours), depth {len(path)}, perplexity {row['perplexity']:.1f} on {part} test "
               f"split in this run's windows of {test.context_length} tokens: {text!r}")
