"""A run of the language model's training, once its settings are known: open the text, train, evaluate, export.

Two functions: :func:`data` opens the text, :func:`training` does the rest. The parts are settings, trainer, checkpoint,
objective and evaluation.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from hbll_seq.data.sources import describe_source
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokenizer, load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.distributed.blocks import blocks_of_rank, numbers_kept
from hbll_seq.distributed.ranks import Ranks
from hbll_seq.evaluation.perplexity import evaluate_paths, format_table, part_read
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.base import Objective
from hbll_seq.training.bundled import show_bundled
from hbll_seq.training.devices import check_memory, on_main, precision_name, start_trackers, track
from hbll_seq.training.export import export
from hbll_seq.training.failures import append_line
from hbll_seq.training.initial_model import InitialModel, take_weights
from hbll_seq.training.objective import evaluated_paths, make_objective
from hbll_seq.training.resuming import Resumed, check_identity
from hbll_seq.training.run_folder import prepare_folder
from hbll_seq.training.run_record import EVALUATIONS, lines_of
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.share import Share
from hbll_seq.training.signals import StopNow, StopSignal
from hbll_seq.training.trainer import Stopped, Trainer
from hbll_seq.utils.console import is_first_process, say

#: that are evaluated; the test split at the end only
SPLITS = ("validation", "test")
#: characters of the validation text that a sample begins with, where no prompt is given
_PROMPT = 40


class Data(NamedTuple):
    """The tokenizer and the three splits."""

    tokenizer: Tokenizer
    train: TokenWindows
    validation: TokenWindows
    test: TokenWindows


def data(settings: TrainingSettings, tokenizer: Tokenizer | None = None) -> Data:
    """Tokenizer and packed windows of the three splits.

    Args:
        settings: that name them.
        tokenizer: in place of the one that they name.

    Raises:
        ValueError: the text cannot be used.
    """
    if is_first_process():
        say("\n".join(describe_source(settings.data)))
    if tokenizer is not None:
        pass
    elif settings.tokenizer == "default":
        tokenizer = Tokenizer.default()
    elif settings.tokenizer == "train":
        tokenizer = load_tokenizer(
            settings.data, settings.vocab_size, column=settings.column, cache_dir=settings.cache_dir
        )
    else:
        tokenizer = Tokenizer.from_file(settings.tokenizer)

    def windows(split: str) -> TokenWindows:
        stream = load_tokens(settings.data, split, tokenizer, column=settings.column, cache_dir=settings.cache_dir,
                             num_proc=settings.num_proc)
        # a short evaluation split is read in shorter windows; for training that would change the model's context
        context_length = settings.context_length if split == "train" else min(settings.context_length, stream.n_tokens - 1)
        try:
            return TokenWindows(stream, context_length)
        except ValueError as error:
            raise ValueError(f"{split} split of data={settings.data!r}: {error}") from None

    return Data(tokenizer, *(windows(split) for split in ("train", "validation", "test")))


def training(
    settings: TrainingSettings, data: Data, accelerator: Accelerator, origin: dict[str, Any], stop: StopSignal, ranks: Ranks,
    *, resumed: Resumed | None = None, initial: InitialModel | None = None,
) -> None:
    """Train to the end, evaluate, and write the model, the figures and metrics.json.

    Args:
        settings: of the run, resolved.
        data: what they name, opened.
        accelerator: made from them.
        origin: where they come from: the preset, what was left open, the locations of files; stored in every checkpoint.
        stop: asked after every step.
        ranks: where this process stands among those that train.
        resumed: the checkpoint to go on from.
        initial: the model whose weights the run starts with.

    Raises:
        ValueError: the output folder cannot be written, or the checkpoint does not fit.
        RunFailed: the run cannot go on.
        Stopped: a signal came; the run is saved.
    """
    folder = Path(settings.output_dir)
    identity = identity_of(settings, data, accelerator, origin)
    if resumed is not None:
        check_identity(identity, resumed.state)
    model, objective = untrained(settings, data.tokenizer, ranks, origin, initial)
    share = Share(objective, ranks, settings.chunk_size)
    paths, evaluations = evaluated_paths(settings, model), lines_of(folder, EVALUATIONS)

    def evaluate(step: int) -> None:
        with share.whole_model() as whole, accelerator.autocast():
            if accelerator.is_main_process:
                row = evaluation(whole, data, paths, settings, step, final=step == trainer.total_steps)
        if accelerator.is_main_process:
            append_line(evaluations, row)
            losses = {f"{split}/{r['name']}": r["loss"] for split in SPLITS if split in row for r in row[split]}
            track(accelerator, losses, step)

    with stop.interruptible(False):  # from here on a signal waits until the step is done and saved
        added = origin.get("extended", [])
        trainer = Trainer(accelerator, objective, data.train, settings, folder, identity, stop, evaluate, added, share)
        steps = None if resumed is None else trainer.restore(resumed.tensors, resumed.state)
        on_main(lambda: prepare_folder(folder, settings.to_yaml(origin["asked"]), steps, extending=bool(added)))
        if accelerator.is_main_process:
            say(describe(model, data, trainer))
        start_trackers(accelerator, settings)
        total = trainer.total_steps
        evaluated = max((row["step"] for row in evaluations.rows() if "test" in row or row["step"] < total), default=0)
        trainer.run(evaluated)
        if evaluated < total:
            try:
                with stop.interruptible(accelerator.num_processes == 1):
                    evaluate(total)
            except StopNow:
                raise Stopped(trainer.done, stop.received) from None
        with share.whole_model() as whole:
            on_main(lambda: export(whole, settings, trainer, evaluations.rows()))
        if stop.received:
            raise Stopped(trainer.done, stop.received)


def identity_of(settings: TrainingSettings, data: Data, accelerator: Accelerator, origin: dict[str, Any]) -> dict[str, Any]:
    """What a run stores of itself in every checkpoint."""
    return {
        "settings": asdict(settings),
        **origin,
        "num_processes": accelerator.num_processes,
        "precision": precision_name(accelerator),
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "tokenizer": data.tokenizer.fingerprint,
        "data": data.train.stream.fingerprint,
        "validation": data.validation.stream.fingerprint,
        "test": data.test.stream.fingerprint,
    }


def untrained(
    settings: TrainingSettings, tokenizer: Tokenizer, ranks: Ranks, origin: dict[str, Any],
    initial: InitialModel | None,
) -> tuple[HBLLForCausalLM, Objective]:
    """The model that the settings name, with the blocks that this rank keeps, its weights those of their seed or of
    ``initial``, and the objective around it."""
    set_seed(settings.seed)
    vocab_size = (origin.get("initial_model") or {}).get("vocab_size", tokenizer.vocab_size)
    config = settings.model_config(vocab_size)
    path, own = settings.path_blocks or config.full_path, None
    if ranks.n_ranks > 1:
        owned = blocks_of_rank(len(path), settings.chunk_size, ranks.rank, ranks.n_ranks, ranks.shares)
        own = numbers_kept(config.n_layer, path, owned)
    check_memory(config, own, gathers=ranks.rank == ranks.replica == 0)
    model = HBLLForCausalLM(config, tokenizer=tokenizer, own=own)
    if initial is not None:
        take_weights(model, initial)
    objective = make_objective(settings, model, ranks.replica, ranks)
    model.config = replace(model.config, trained_paths=objective.trained_paths())
    objective.freeze_unread()  # the model is this run's own: every process waits for a gradient of all that is trained
    return model, objective


def evaluation(
    model: HBLLForCausalLM, data: Data, paths: dict[str, tuple[int, ...]], settings: TrainingSettings, step: int, final: bool
) -> dict[str, Any]:
    """Perplexity of every path on the validation split, at the end on the test split too, and a sample of text at two
    depths, printed and returned."""
    row: dict[str, Any] = {"step": step}
    for split in SPLITS if final else SPLITS[:1]:
        windows = getattr(data, split)
        row[split] = evaluate_paths(
            model, windows, paths, batch_size=settings.eval_batch_size, carry_state=settings.carry_state,
            max_batches=settings.final_eval_batches if final else settings.eval_batches,
        )
        read = part_read(row[split][0]["tokens"], windows.stream)  # at the end more than before
        tqdm.write(f"\n{split}, after {step} steps, on {read}\n{format_table(row[split])}")
    row["samples"], prompt = [], settings.sample_prompt or beginning_of(data)
    for path in dict.fromkeys([min(paths.values(), key=len), max(paths.values(), key=len)]):
        if settings.sample_tokens:
            text = model.generate(prompt, path=path, max_new_tokens=settings.sample_tokens,
                                  seed=settings.seed, truncate_prompt=True)
            row["samples"].append({"depth": len(path), "path": list(path), "text": text})
            tqdm.write(f"depth {len(path)}: {text!r}")
    if final and settings.data == "bundled" and settings.sample_tokens:
        show_bundled(model, data.test, prompt, settings)
    sys.stdout.flush()
    return row


def beginning_of(data: Data) -> str:
    """The first words of the validation text, as a prompt in the text's own language; a blank where there is none."""
    tokens = data.validation.stream.tokens[:256].tolist()
    lines = [line.strip() for line in data.tokenizer.decode(tokens).splitlines()]
    line = next(filter(None, lines), " ")
    return line if len(line) <= _PROMPT else line[:_PROMPT].rpartition(" ")[0] or line[:_PROMPT]


def describe(model: HBLLForCausalLM, data: Data, trainer: Trainer) -> str:
    """One line on what is about to run."""
    accelerator, ranks = trainer.accelerator, trainer.ranks
    spread = f", each model's blocks on {ranks.n_ranks}" if ranks.n_ranks > 1 else ""
    spread += ", each ahead of the next" if trainer.settings.ahead else ""
    return (
        f"{trainer.share.n_parameters:,} parameters in {model.config.n_layer} blocks, {data.train.stream.n_tokens:,} "
        f"training tokens, steps {trainer.done} to {trainer.total_steps} of {trainer.windows_per_step} x "
        f"{data.train.context_length} tokens, on {accelerator.num_processes} x {accelerator.device.type}{spread} "
        f"({precision_name(accelerator)}, {torch.get_num_threads()} threads)"
    )
