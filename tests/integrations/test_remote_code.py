"""What push_to_hub uploads, loaded by transformers with trust_remote_code, in a process that imports nothing of ours."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="needs the extra [hf]")

from helpers.hub_server import TOKEN, standing_in  # noqa: E402
from helpers.language_models import TOKENIZER, model_of  # noqa: E402
from huggingface_hub import constants  # noqa: E402

PROGRAM = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

name = sys.argv[1]
assert "hbll_seq" not in sys.modules
try:
    AutoConfig.from_pretrained(name, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("loaded without trust")
model = AutoModelForCausalLM.from_pretrained(name, depth=3, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
ids = model.generate(**tokenizer("The city", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print("path", *model.path)
print("ids", *ids[0].tolist())
model.save_pretrained(sys.argv[2])
"""


def test_a_pushed_repository_points_to_our_code(monkeypatch, tmp_path):
    model = model_of(TOKENIZER)
    with standing_in() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        model.push_to_hub("me/small", token=TOKEN)
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", PROGRAM, "me/small", str(tmp_path / "saved")]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = dict(line.split(" ", 1) for line in ended.stdout.splitlines() if line.startswith(("path ", "ids ")))
    assert lines["path"] == "4 6 7"
    text = TOKENIZER.decode([int(i) for i in lines["ids"].split()])
    assert text == model.generate("The city", depth=3, temperature=0, max_new_tokens=8)
    again = type(model).from_pretrained(tmp_path / "saved")
    assert again.config == model.config and "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
