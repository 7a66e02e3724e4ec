"""Train a hierarchical block-local language model.

By hand: ``accelerate launch train/lm.py [--preset NAME] [options]``.

Three functions: :func:`data` opens the text, :func:`training` trains, evaluates and exports, :func:`run` reads the
command line. The parts are in the library: settings, trainer, checkpoint, objective, evaluation.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before torch loads OpenMP: spinning threads crawl on cores that other programs use too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a signal ends the process without a traceback also while it imports, and after the run; `nohup` is obeyed
    for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        _number = getattr(signal, _name, None)
        if _number and not (_name == "SIGHUP" and signal.getsignal(_number) == signal.SIG_IGN):
            signal.signal(_number, lambda number, _: os._exit(128 + number))

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from hbll_seq.data.sources import describe_source
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokenizer, load_tokens
from hbll_seq.data.windows import TokenWindows
from hbll_seq.evaluation.perplexity import evaluate_paths, format_table
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.objectives.base import Objective
from hbll_seq.training.command_line import build_parser
from hbll_seq.training.devices import (
    check_memory,
    end_trackers,
    join_processes,
    leaving_processes,
    make_accelerator,
    on_main,
    precision_name,
    start_trackers,
    track,
)
from hbll_seq.training.export import count_parameters, export
from hbll_seq.training.failures import RunFailed, disk_is_full, memory_is_full
from hbll_seq.training.objective import evaluated_paths, make_objective
from hbll_seq.training.presets import DEFAULT_PRESET, preset_fingerprint, read_preset, resolve
from hbll_seq.training.resuming import (
    NEWEST,
    Resumed,
    check_identity,
    check_resumable,
    folder_of,
    located,
    locations,
    resume_run,
)
from hbll_seq.training.run_folder import EVALUATIONS, check_folder, check_place, is_finished, lines_of, prepare_folder
from hbll_seq.training.run_lock import FolderLock
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.signals import StopNow, StopSignal
from hbll_seq.training.trainer import Stopped, Trainer, append_line
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.console import forgiving_output, is_first_process, say
from hbll_seq.utils.reading import shorten

PRESETS = Path(__file__).resolve().parent / "presets"
EPILOG = """\
The output folder gets settings.yaml, metrics.jsonl (one line per logged step), evaluations.jsonl, checkpoints/, and at
the end the model in Hugging Face layout, metrics.json, training_curve.png and perplexity_by_depth.png.

SIGTERM, Ctrl-C, SIGUSR1 (Slurm's --signal=USR1) or a closed terminal (SIGHUP, unless nohup has it ignored): the step is
finished, a checkpoint saved, and the process ends with 128 + the signal's number (143, 130, 138, 129); a second signal ends
it at once, with the first one's code. --resume goes on as if nothing had happened, bit for bit on a CPU with the same number
of threads; another precision or text is refused, wherever the text lies now. --resume STEP removes what is newer than STEP.
One run at a time holds a folder; files that no run has written are never removed or overwritten. Output that cannot be
written and a tracker of --log-with that fails do not end a run.
Exit codes: 0 done, 1 the run failed (loss not finite, disk full), 2 a wrong option or input.
"""


#: that are evaluated; the test split at the end only
SPLITS = ("validation", "test")


class Data(NamedTuple):
    """The tokenizer and the three splits."""

    tokenizer: Tokenizer
    train: TokenWindows
    validation: TokenWindows
    test: TokenWindows


def data(settings: TrainingSettings) -> Data:
    """Tokenizer and packed windows of the three splits. Raises ValueError when the text cannot be used."""
    if is_first_process():
        say("\n".join(describe_source(settings.data)))
    if settings.tokenizer == "default":
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
    settings: TrainingSettings, data: Data, accelerator: Accelerator, origin: dict[str, Any], stop: StopSignal,
    resumed: Resumed | None = None,
) -> None:
    """Train to the end, evaluate, and write the model, the figures and metrics.json.

    Args:
        settings: of the run, resolved.
        data: what they name, opened.
        accelerator: made from them.
        origin: where they come from: the preset, what was left open, the locations of files; stored in every checkpoint.
        stop: asked after every step.
        resumed: the checkpoint to go on from.

    Raises:
        ValueError: the output folder cannot be written, or the checkpoint does not fit.
        RunFailed: the run cannot go on.
        Stopped: a signal came; the run is saved.
    """
    folder = Path(settings.output_dir)
    identity = identity_of(settings, data, accelerator, origin)
    if resumed is not None:
        check_identity(identity, resumed.state)
    model, objective = untrained(settings, data.tokenizer, accelerator.process_index)
    paths, evaluations = evaluated_paths(settings, model), lines_of(folder, EVALUATIONS)

    def evaluate(step: int) -> None:
        if accelerator.is_main_process:
            with accelerator.autocast():
                row = evaluation(model, data, paths, settings, step, final=step == trainer.total_steps)
            append_line(evaluations, row)
            losses = {f"{split}/{r['name']}": r["loss"] for split in SPLITS if split in row for r in row[split]}
            track(accelerator, losses, step)

    with stop.interruptible(False):  # from here on a signal waits until the step is done and saved
        trainer = Trainer(accelerator, objective, data.train, settings, folder, identity, stop, evaluate)
        if resumed is not None:
            trainer.restore(resumed.tensors, resumed.state)
        steps = None if resumed is None else trainer.done
        on_main(lambda: prepare_folder(folder, settings.to_yaml(origin["asked"]), steps))
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
        on_main(lambda: export(model, settings, trainer, evaluations.rows()))
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


def untrained(settings: TrainingSettings, tokenizer: Tokenizer, rank: int) -> tuple[HBLLForCausalLM, Objective]:
    """The model that the settings name, its weights those of their seed, and the objective around it."""
    set_seed(settings.seed)
    config = settings.model_config(tokenizer.vocab_size)
    check_memory(config)
    model = HBLLForCausalLM(config, tokenizer=tokenizer)
    objective = make_objective(settings, model, rank)
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
        row[split] = evaluate_paths(
            model, getattr(data, split), paths, batch_size=settings.eval_batch_size, carry_state=settings.carry_state,
            max_batches=settings.final_eval_batches if final else settings.eval_batches,
        )
        tqdm.write(f"\n{split}, after {step} steps\n{format_table(row[split])}")
    row["samples"] = []
    for path in dict.fromkeys([min(paths.values(), key=len), max(paths.values(), key=len)]):
        if settings.sample_tokens:
            text = model.generate(settings.sample_prompt, path=path, max_new_tokens=settings.sample_tokens,
                                  seed=settings.seed, truncate_prompt=True)
            row["samples"].append({"depth": len(path), "path": list(path), "text": text})
            tqdm.write(f"depth {len(path)}: {text!r}")
    sys.stdout.flush()
    return row


def describe(model: HBLLForCausalLM, data: Data, trainer: Trainer) -> str:
    """One line on what is about to run."""
    accelerator = trainer.accelerator
    return (
        f"{count_parameters(model):,} parameters in {model.config.n_layer} blocks, {data.train.stream.n_tokens:,} "
        f"training tokens, steps {trainer.done} to {trainer.total_steps} of {trainer.windows_per_step} x "
        f"{data.train.context_length} tokens, on {accelerator.num_processes} x {accelerator.device.type} "
        f"({precision_name(accelerator)}, {torch.get_num_threads()} threads)"
    )


def main(argv: list[str] | None = None) -> int:
    """Read the command line, run, and return the exit code, whatever becomes of the output; 128 + n after signal n."""
    with forgiving_output(), StopSignal() as stop:
        code = 0
        try:
            with leaving_processes(), stop.interruptible():
                code = run(argv, stop)
        except StopNow:  # outside of training, which saves first
            if code == 0:  # else the run has told how it ended
                say(f"\nstopped by signal {stop.received} outside of training: no step is lost")
                code = 128 + stop.received
        except KeyboardInterrupt:
            code = 130
        return code


def chosen(given: dict[str, Any], preset: str | None, resume: int | None) -> tuple[TrainingSettings, dict, Resumed | None]:
    """The settings of a command line, resolved; where they come from, as checkpoints say it; the checkpoint to go on from."""
    if resume is None:
        preset = DEFAULT_PRESET if preset is None else preset
        values = read_preset(preset, PRESETS)
        asked, resumed, fingerprint = resolve(values, given), None, preset_fingerprint(values)
        settings, left_open = asked.resolved(), asked.left_open()
    else:
        settings, preset, resumed = resume_run(given, preset, resume, PRESETS)
        fingerprint, left_open = resumed.state.get("preset_sha256"), resumed.state["asked"]
    config = settings.model_config(vocab_size=2)  # a wrong shape or path is told before the text is opened
    DyadicTree(config.n_level).validate_path(settings.path_blocks or (config.n_layer // 2 + 1,))
    return settings, {"preset": preset, "preset_sha256": fingerprint, "asked": left_open}, resumed


def start(argv: list[str] | None, stop: StopSignal) -> tuple[int, str | None]:
    """Do what the command line says; returns the exit code and what is to be said last."""
    given = vars(build_parser(__doc__.splitlines()[0], PRESETS, EPILOG).parse_args(argv))
    preset, resume, overwrite, dry_run = (given.pop(k) for k in ("preset", "resume", "overwrite", "dry_run"))
    if resume is not None and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of the two")
    if dry_run:
        settings, origin, _ = chosen(given, preset, resume)
        if is_first_process():
            print(f"# preset {origin['preset']} and these options\n\n{settings.to_yaml(origin['asked'])}", end="")
        return 0, None
    if resume is None:
        folder = Path(chosen(given, preset, None)[0].output_dir)
    else:
        folder = folder_of(given)
        check_resumable(folder, resume)
        if resume == NEWEST and is_finished(folder):
            chosen(given, preset, resume)  # other settings than the run's are told all the same
            return 0, f"{folder} holds a finished run: nothing is left to do"
    check_place(folder)
    join_processes()
    lock = None
    try:
        lock = on_main(lambda: FolderLock(folder))
        settings, origin, resumed = chosen(given, preset, resume)
        where = settings if resumed is None else located(settings, given, resumed)
        on_main(lambda: check_folder(folder, where, resuming=resumed is not None, overwrite=overwrite))
        accelerator = make_accelerator(settings)
        try:
            opened = data(where)
            accelerator.wait_for_everyone()  # every process has looked at the folder before one changes it
            training(settings, opened, accelerator, {**origin, "locations": locations(where)}, stop, resumed)
        finally:
            end_trackers(accelerator)
    except Stopped as stopped:
        code = 128 + (stopped.signal_number or 15)
        return code, f"\nstopped after step {stopped.step}, saved; go on with --resume --output-dir {folder}"
    finally:
        if lock is not None:
            lock.release()
    return 0, None


def run(argv: list[str] | None, stop: StopSignal) -> int:
    """What `main` does, before the process group is left."""
    message = None
    try:
        code, message = start(argv, stop)
    except RunFailed as error:
        code, message = 1, f"\nerror: {shorten(error, 490)}"
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if disk_is_full(error):
            code, message = 1, f"\nerror: {shorten(error, 400)}; make room, then give the same command again"
        elif memory_is_full(error):
            remedy = "lower --batch-size, --eval-batch-size, --context-length, --n-embd or --n-level"
            code, message = 1, f"\nerror: the memory is full ({shorten(error, 200)}); {remedy}"
        elif isinstance(error, RuntimeError):
            raise
        else:
            code, message = 2, f"error: {shorten(error, 490)}"
    if message and is_first_process():
        say(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
