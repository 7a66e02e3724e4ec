"""Train a hierarchical block-local language model.

The command line of ``train/lm.py`` and ``hbll-seq train``: :func:`main` reads it, ``language_model_run`` does what it says.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from hbll_seq.distributed.ranks import make_ranks
from hbll_seq.training.checkpoint import EVERY_FILE
from hbll_seq.training.command_line import build_parser
from hbll_seq.training.devices import (
    ONE_FOLDER,
    all_alike,
    end_trackers,
    join_processes,
    leaving_processes,
    make_accelerator,
    on_all,
    on_main,
)
from hbll_seq.training.failures import RunFailed, one_voice, speaks
from hbll_seq.training.initial_model import (
    InitialModel,
    check_same_model,
    layers_from,
    named_model,
    read_initial_model,
    recorded_tokenizer,
)
from hbll_seq.training.language_model_run import data, training
from hbll_seq.training.presets import DEFAULT_PRESET, PRESETS, preset_fingerprint, read_preset, resolve
from hbll_seq.training.resuming import (
    NEWEST,
    Resumed,
    check_extend,
    check_extendable,
    check_resumable,
    folder_of,
    located,
    locations,
    resume_run,
)
from hbll_seq.training.run_folder import check_folder, check_place
from hbll_seq.training.run_lock import FolderLock
from hbll_seq.training.run_record import CHECKPOINTS, finished_step
from hbll_seq.training.settings import TrainingSettings
from hbll_seq.training.settings_read import unused
from hbll_seq.training.signals import StopNow, StopSignal
from hbll_seq.training.trainer import Stopped
from hbll_seq.tree.topology import DyadicTree
from hbll_seq.utils.console import forgiving_output, is_first_process, say
from hbll_seq.utils.exhausted import disk_is_full, memory_is_full
from hbll_seq.utils.reading import shorten

EPILOG = """\
The output folder gets settings.yaml, metrics.jsonl (one line per logged step),
evaluations.jsonl, checkpoints/, and at the end the model in Hugging Face
layout, metrics.json and figures: training_curve.png, perplexity_by_depth.png,
tradeoff.png, tree.png (not of backprop).

SIGTERM, Ctrl-C, SIGUSR1 (Slurm's --signal=USR1) or a closed terminal (SIGHUP,
unless nohup has it ignored): the step is finished, a checkpoint saved, and the
process ends with 128 + the signal's number (143, 130, 138, 129); a second
signal ends it at once, with the first one's code. --resume goes on as if
nothing had happened, bit for bit on a CPU with the same number of threads;
another precision or text is refused, wherever the text lies now. --resume STEP
removes what is newer than STEP. One run at a time holds a folder; files that
no run has written are never removed or overwritten. Output that cannot be
written and a tracker of --log-with that fails do not end a run.
Exit codes: 0 done, 1 the run failed (loss not finite, disk full), 2 a wrong
option or input.
"""


def main(argv: list[str] | None = None) -> int:
    """Read the command line, run, and return the exit code, whatever becomes of the output; 128 + n after signal n.

    A program that calls it should set ``OMP_WAIT_POLICY=PASSIVE`` before torch is loaded, as train/lm.py does.
    """
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


class Chosen(NamedTuple):
    """What a command line asks for.

    settings: resolved.
    origin: where they come from, as checkpoints say it.
    resumed: the checkpoint to go on from.
    initial: the model to train on from, of a run that starts.
    """

    settings: TrainingSettings
    origin: dict[str, Any]
    resumed: Resumed | None = None
    initial: InitialModel | None = None


def chosen(
    given: dict[str, Any], preset: str | None, resume: int | None, extend: int | None = None,
    turn: tuple[int, int] = EVERY_FILE,
) -> Chosen:  # fmt: skip
    """What the command line asks for; ``turn`` as of :func:`hbll_seq.training.checkpoint.load_checkpoint`. Raises ValueError
    where that cannot be."""
    initial, extended = None, []
    if resume is None:
        preset = DEFAULT_PRESET if preset is None else preset
        values = read_preset(preset, PRESETS)
        layers = [values, given]
        if name := named_model(values, given):
            initial = read_initial_model(name)
            layers = layers_from(initial, values, given)
        asked, resumed, fingerprint = resolve(*layers), None, preset_fingerprint(values)
        settings, left_open = asked.resolved(), asked.left_open()
        record = initial and initial.record(settings)
    else:
        settings, preset, resumed = resume_run(given, preset, resume, PRESETS, turn)
        fingerprint, left_open = resumed.state.get("preset_sha256"), resumed.state["asked"]
        record = resumed.state.get("initial_model")
        extended = [*resumed.state.get("extended", []), *([] if extend is None else [extend])]
        if settings.init_from and "init_from" in given:
            check_same_model(settings.init_from, resumed.state)
    config = settings.model_config(vocab_size=2)  # a wrong shape or path is told before the text is opened
    DyadicTree(config.n_level).validate_path(settings.path_blocks or (config.n_layer // 2 + 1,))
    origin = {"preset": preset, "preset_sha256": fingerprint, "asked": left_open, "initial_model": record,
              "extended": extended}
    return Chosen(settings, origin, resumed, initial)


def start(argv: list[str] | None, stop: StopSignal) -> tuple[int, str | None]:
    """Do what the command line says; returns the exit code and what is to be said last."""
    given = vars(build_parser(__doc__.splitlines()[0], PRESETS, EPILOG).parse_args(argv))
    what = ("preset", "resume", "extend", "overwrite", "dry_run")
    preset, resume, extend, overwrite, dry_run = (given.pop(name) for name in what)
    if resume is not None and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: give one of the two")
    if extend is not None:
        check_extend(extend, resume, overwrite)
        check_extendable(folder_of(given))
        resume = NEWEST
    if dry_run:
        settings, origin, *_ = chosen(given, preset, resume)
        if is_first_process():
            print(f"# preset {origin['preset']} and these options\n\n{settings.to_yaml(origin['asked'])}", end="")
        return 0, None
    asked = None
    if resume is None:
        asked = chosen(given, preset, None)  # once: a model that is trained on is read whole, to check it
        folder = Path(asked.settings.output_dir)
    else:
        folder = folder_of(given)
        check_resumable(folder, resume)
        if extend is None and resume == NEWEST and (finished_step(folder) or -1) >= check_resumable(folder):
            chosen(given, preset, resume)  # other settings than the run's are told all the same
            return 0, f"{folder} holds a finished run: nothing is left to do"
    check_place(folder)
    processes, lock = join_processes(), None
    try:
        lock = on_main(lambda: FolderLock(folder))
        turn = processes.process_index, processes.num_processes
        settings, origin, resumed, initial = asked or on_all(lambda: chosen(given, preset, resume, extend, turn))
        if not all_alike(resumed and resumed.fingerprint):
            raise ValueError(f"the processes of this launch see different checkpoints in {folder}: {ONE_FOLDER}")
        where = settings if resumed is None else located(settings, given, resumed)
        on_main(lambda: check_folder(folder, where, resuming=resumed is not None, overwrite=overwrite))
        if (warning := unused(settings, given)) and is_first_process():
            say(warning)
        accelerator = make_accelerator(settings)
        patience = timedelta(seconds=settings.rank_timeout)
        ranks = make_ranks(settings.block_parallel, accelerator.device.type, patience, settings.shares)
        try:
            opened = data(where, recorded_tokenizer(origin["initial_model"]))
            accelerator.wait_for_everyone()  # every process has looked at the folder before one changes it
            origin = {**origin, "locations": locations(where)}
            with one_voice(ranks, folder / CHECKPOINTS):
                training(settings, opened, accelerator, origin, stop, ranks, resumed=resumed, initial=initial)
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
    message = ended_by = None
    try:
        code, message = start(argv, stop)
    except RunFailed as error:
        code, message, ended_by = 1, f"\nerror: {shorten(error, 490)}", error
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        ended_by = error
        if disk_is_full(error):
            code, message = 1, f"\nerror: {shorten(error, 400)}; make room, then give the same command again"
        elif memory_is_full(error):
            remedy = "lower --batch-size, --eval-batch-size, --context-length, --n-embd or --n-level"
            code, message = 1, f"\nerror: the memory is full ({shorten(error, 200)}); {remedy}"
        elif isinstance(error, RuntimeError):
            raise
        else:
            code, message = 2, f"error: {shorten(error, 490)}"
    if message and speaks(ended_by):
        say(message)
    return code
