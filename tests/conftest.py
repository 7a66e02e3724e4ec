"""Fixtures of several test files: of the training script's, and of those that read text."""

import os
import random
import signal
from pathlib import Path

# before torch loads OpenMP: beside a program that keeps a core busy, spinning threads made these small tensors crawl
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import kill_and_resume as kr  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from hbll_seq.data.tokenizer import Tokenizer  # noqa: E402
from hbll_seq.training import checkpoint as ck  # noqa: E402
from hbll_seq.training import plots  # noqa: E402

torch.set_num_threads(1)


def checked_alone(file) -> None:
    """os.fsync without the wait for the disk: what a power failure leaves is tests/kill_points.py's, in its own processes."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = checked_alone


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n 2`` a file stays on one worker: its runs, which its tests share, are made once. In the order of the names, so
    that the files at the end are short ones and no worker waits long for the other."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def blank_figure():
    """An empty figure of Matplotlib's, as a file."""
    return plots._png(plots.new_figure(0.1, 0.1))


@pytest.fixture
def blank_figures(monkeypatch, blank_figure):
    """The figures of a run are empty ones: drawing them takes longer than a short run."""
    monkeypatch.setattr(plots, "_png", lambda figure: blank_figure)


@pytest.fixture(scope="session")
def lm_options(tmp_path_factory):
    """Options of a run that takes about a second: 3 blocks, a text of our own."""
    folder = tmp_path_factory.mktemp("lm")
    rng = random.Random(0)
    words = ["tree", "node", "level", "block", "the", "a", "of", "in", "reads", "writes", "state", "path", "."]
    text = "\n".join(" ".join(rng.choice(words) for _ in range(12)) for _ in range(600))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    before = torch.get_num_threads()
    yield ["--preset", "debug", "--data", str(folder / "text.txt"), "--cache-dir", str(folder / "cache"), "--threads",
           "1", "--max-steps", "60", "--eval-every", "20", "--sample-tokens", "3"]
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole_run(lm_options, tmp_path_factory):
    """The unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert kr.load_script().main([*lm_options, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def any_precision():
    """Runs of several precisions in this process, for which Accelerate keeps one precision otherwise."""

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)

    forget()
    yield forget
    forget()


@pytest.fixture
def stopped_run(lm_options, tmp_path, monkeypatch):
    """A run stopped after 12 steps, with checkpoints of the steps 10 and 12."""
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        kr.at_step(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert kr.load_script().main([*lm_options, "--output-dir", str(folder)]) == 143
    assert ck.list_checkpoints(folder / "checkpoints") == [10, 12]
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text file of some 20 kB."""
    path = tmp_path / "t.txt"
    path.write_text("".join(f" The {i} th line has words , {i * i} .\n" for i in range(500)), encoding="utf-8")
    return str(path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
