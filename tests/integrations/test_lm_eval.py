"""lm-evaluation-harness on our folders, by depth: a tiny task of local files, against our own log-likelihoods."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra [hf]")

import lm_eval  # noqa: E402
from helpers.language_models import TOKENIZER, model_of  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import MODEL_REGISTRY  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import hbll_seq.integrations.lm_eval as ours  # noqa: E402
from hbll_seq.data.tokens import load_tokens  # noqa: E402
from hbll_seq.data.windows import TokenWindows  # noqa: E402
from hbll_seq.evaluation.perplexity import evaluate_paths  # noqa: E402
from hbll_seq.integrations.lm_eval import HBLLHarnessLM, register  # noqa: E402
from hbll_seq.models.causal_lm import HBLLForCausalLM  # noqa: E402

DEPTHS = (1, 3, 7)
ROWS = [
    {"text": "The history of the city", "choices": [" is long .", " was short"], "label": 0},
    {"text": "A", "choices": [" tree has leaves and roots", " b"], "label": 1},
    {"text": "In 1990 , the town", "choices": [" grew", " fell into the sea one day in the morning"], "label": 1},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    model_of(TOKENIZER, vocab_size=4100).save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(data=folder / "rows.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def requests(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@torch.no_grad()
def nats(model, depth, context, scored):
    """The sum of log-probabilities of the ids ``scored`` after ``context``, one position at a time."""
    path, total = model.resolve_path(depth), 0.0
    for i, target in enumerate(scored):
        ids = torch.tensor([[*context, *scored[:i]]])
        total += model(ids, path=path).logits[0, -1].log_softmax(-1)[target].item()
    return total


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihoods_are_those_of_the_model(folder, depth, batch_size):
    lm = HBLLHarnessLM(str(folder / "model"), depth=depth, batch_size=batch_size)
    pairs = [("The city", " is long"), ("A", " tree"), ("", "A tree"), ("In the ", "sea")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found):
        before = TOKENIZER.encode(context.rstrip()) or [TOKENIZER.eos_id]
        whole = TOKENIZER.encode(context + continuation)
        scored = whole if not context else whole[len(before) :]
        assert value == pytest.approx(nats(lm.model, depth, before, scored), abs=1e-4) and value < 0 and not is_greedy
    ids = TOKENIZER.encode("The city")
    with torch.no_grad():
        best = lm.model(torch.tensor([ids]), path=lm.path).logits[0, -1].argmax().item()
    assert lm._score([(ids, [best])])[0][1]


@pytest.mark.parametrize("depth", DEPTHS)
def test_rolling_is_our_own_evaluation(folder, tmp_path, depth):
    """On a text of whole windows, with the end of text before it as our evaluation has it."""
    length, text = 12, "the tree has a leaf .\n" * 40
    while len(TOKENIZER.encode(text)) % length:
        text = text[:-1]
    ids = TOKENIZER.encode(text)
    (tmp_path / "t.txt").write_text(text)
    stream = load_tokens(str(tmp_path / "t.txt"), "train", TOKENIZER, cache_dir=tmp_path / "cache")
    stream = replace(stream, tokens=np.array([TOKENIZER.eos_id, *ids], stream.tokens.dtype))
    model = HBLLForCausalLM.from_pretrained(folder / "model")
    lm = HBLLHarnessLM(model, depth=depth, batch_size=4)
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    (row,) = evaluate_paths(model, TokenWindows(stream, length), {"it": model.resolve_path(depth)})
    assert row["tokens"] == len(ids) and -total == pytest.approx(row["loss"] * len(ids), rel=1e-6)


def test_texts_are_ours_up_to_the_stop_string(folder):
    lm = HBLLHarnessLM(str(folder / "model"), depth=3, batch_size=2)
    prompts = ["The history of the city", "A", "In 1990 , the town"]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    found = lm.generate_until(requests("generate_until", *((prompt, options) for prompt in prompts)), disable_tqdm=True)
    whole = [lm.model.generate(prompt, depth=3, temperature=0, max_new_tokens=12) for prompt in prompts]
    assert [prompt + text for prompt, text in zip(prompts, found)] == whole
    options = {"until": ["e", "a"], "max_gen_toks": 12}
    stopped = lm.generate_until(requests("generate_until", *((prompt, options) for prompt in prompts)), disable_tqdm=True)
    for text, cut in zip(found, stopped):
        assert text.startswith(cut) and not set(cut) & set("ea")
    with pytest.raises(ValueError, match="generation option 'num_beams' is not known here"):
        lm.generate_until(requests("generate_until", ("A", {"num_beams": 2})), disable_tqdm=True)


def test_the_harness_keeps_its_own_models():
    register()
    assert {"hbll", "hf", "dummy"} <= set(MODEL_REGISTRY)


def test_options(folder, tmp_path):
    for path in ("4-6-7", [4, 6, 7]):
        assert HBLLHarnessLM(str(folder / "model"), path=path).path == (4, 6, 7)
    assert HBLLHarnessLM(str(folder / "model"), path=4).path == (4,)
    assert HBLLHarnessLM(str(folder / "model"), batch_size="auto").batch_size == 16
    assert HBLLHarnessLM(model_of(TOKENIZER, cell="gru")).max_length is None
    lm = HBLLHarnessLM(str(folder / "model"), dtype="bfloat16", max_length=5)
    assert lm.model.embed.weight.dtype == torch.bfloat16 and lm._cut([1] * 9, [2, 3])[0] == [1, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="a continuation of 6 tokens, more than max_length=5"):
        lm._cut([1], [2] * 6)
    for wrong, message in ((dict(depth=9), "depth"), (dict(batch_size=0), "batch_size=0"), (dict(dtipe="x"), "dtipe")):
        with pytest.raises(ValueError, match=message):
            HBLLHarnessLM(str(folder / "model"), **wrong)
    model_of().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        HBLLHarnessLM(str(tmp_path))


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_tiny_task(folder, depth):
    register()
    tasks = ["tiny_choice", "tiny_perplexity", "tiny_writing"]
    arguments = dict(pretrained=str(folder / "model"), depth=depth)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found = simple_evaluate(
        "hbll", model_args=arguments, tasks=tasks, task_manager=manager, batch_size=2, bootstrap_iters=0, verbosity="ERROR"
    )
    model, right, total = HBLLForCausalLM.from_pretrained(folder / "model"), 0, 0.0
    for row in ROWS:
        ids = TOKENIZER.encode(row["text"])
        scores = [nats(model, depth, ids, TOKENIZER.encode(row["text"] + c)[len(ids) :]) for c in row["choices"]]
        right += scores.index(max(scores)) == row["label"]
        total += nats(model, depth, [TOKENIZER.eos_id], ids)
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(ROWS))
    n_bytes = sum(len(row["text"].encode()) for row in ROWS)
    bits = found["results"]["tiny_perplexity"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / n_bytes / math.log(2), rel=1e-5)
    assert found["results"]["tiny_writing"]["exact_match,none"] == 0


def test_the_program(folder, tmp_path, monkeypatch):
    """Its own tasks, thousands of files, are left out: to read them takes the harness half a minute."""
    arguments = ["--model", "hbll", "--tasks", "tiny_choice", "--model_args", f"pretrained={folder / 'model'},depth=3"]
    arguments += ["--include_path", str(folder / "tasks"), "--batch_size", "2", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    ours.main()
    (results,) = tmp_path.rglob("results_*.json")
    found = json.loads(results.read_text())
    assert "acc,none" in found["results"]["tiny_choice"] and found["config"]["model_args"]["depth"] == 3


def test_the_program_starts_by_itself():
    """Where the module is the program, it registers the class of its own name."""
    command = [sys.executable, "-m", "hbll_seq.integrations.lm_eval", "run", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0 and "--model_args" in ended.stdout, ended.stderr[-2000:]
