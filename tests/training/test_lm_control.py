"""train/lm.py --control: K and M are in metrics.jsonl, a stopped run goes on as it would have, bad values end."""

import os
import signal

import kill_and_resume as kr
import pytest
from safetensors.torch import load_file

from hbll_seq.objectives.control import Adaptive
from hbll_seq.objectives.options import Sweeps
from hbll_seq.training.presets import resolve
from hbll_seq.training.settings_read import notable, unused

pytestmark = pytest.mark.usefixtures("blank_figures")

lm = kr.load_script()
CONTROL = ["--forward", "0", "--backward", "0", "--chunk-size", "1", "--control", "adaptive", "--control-tolerance", "1e-6",
           "--control-every", "4"]  # fmt: skip


def test_a_stopped_run_goes_on_with_its_k_and_m(lm_options, tmp_path, monkeypatch):
    options = [*lm_options, *CONTROL, "--grad-accum", "2", "--batch-size", "2", "--max-steps", "16", "--eval-every", "0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert lm.main([*options, "--output-dir", str(whole)]) == 0
    with monkeypatch.context() as patch:
        kr.at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert lm.main([*options, "--output-dir", str(broken)]) == 143
    stored = load_file(broken / "checkpoints" / "step-00000009" / "model.safetensors")
    assert stored["control.counts"].tolist()[0] == 18 and stored["control.chosen"].tolist() != [0, 0]
    assert lm.main(["--resume", "--output-dir", str(broken)]) == 0
    assert kr.differences(whole, broken) == []
    rows = kr.lines(whole)
    sums = [row["forward"] + row["backward"] for row in rows]
    assert sums[0] == 0 < sums[-1] and sums == sorted(sums) and all(row["cosine"] <= 1.00001 for row in rows)


def test_settings_are_objects():
    asked = {"max_steps": 5, "forward": 1, "backward": 1, "chunk_size": 4, "linearization": "identity"}
    assert resolve(asked).inference() == Sweeps(1, 1, 4, "identity", "first")
    settings = resolve(asked, {"control": "adaptive", "control_tolerance": 0.1, "control_most": 3, "control_every": 7})
    assert settings.inference() == Sweeps(1, 1, 4, "identity", "first", control=Adaptive(0.1, 3, 7))
    assert settings.time() == resolve(asked).time() and notable(settings.resolved())["control_every"] == 7
    assert "--control-every" in unused(resolve(asked, {"control_every": 7}).resolved(), {"control_every"})
    assert not unused(settings.resolved(), {"control", "control_every"})


@pytest.mark.parametrize("options, message", [
    (["--control", "mgrit"], "control"),
    (["--control", "adaptive", "--objective", "backprop"], "only sweeps have iterations to control"),
    (["--control", "adaptive", "--forward", "3", "--control-most", "2"], "most=2 of the control with forward=3"),
    (["--control", "adaptive", "--control-tolerance", "0"], "control_tolerance=0.0: must be above 0"),
    (["--control", "adaptive", "--control-every", "0"], "control_every=0: must be at least 1"),
])  # fmt: skip
def test_what_it_cannot_be_ends_with_one_line(lm_options, tmp_path, capsys, options, message):
    kr.fails([*lm_options, *options, "--output-dir", str(tmp_path / "run")], capsys, message)
