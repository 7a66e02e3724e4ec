"""Tasks agree with slow oracles that read only the tokens up to a position; batches are pure functions."""

import random
import statistics
from collections import Counter

import numpy as np
import pytest
import torch

from hbll_seq.data.tasks import (
    LISTOPS_TOKENS,
    SPLITS,
    TASKS,
    AssociativeRecall,
    Induction,
    ListOps,
    count_correct,
    make_task,
)
from hbll_seq.models.causal_lm import HBLLForCausalLM
from hbll_seq.models.config import HBLLConfig
from hbll_seq.tree.posterior import IGNORE_INDEX

CLOSE, PAD = LISTOPS_TOKENS.index("]"), LISTOPS_TOKENS.index("<pad>")


def induction_oracle(task, read):
    """The answer at the last of the tokens read, None without one."""
    at = len(read) - 1
    for _ in range(task.hops):
        earlier = [p for p in range(at) if read[p] == read[at]]
        if not earlier:
            return None
        at = earlier[-1] + 1
    return read[at]


def recall_oracle(task, read):
    if len(read) <= 2 * task.n_pairs:
        return None
    return dict(zip(read[: 2 * task.n_pairs : 2], read[1 : 2 * task.n_pairs : 2]))[read[-1]]


def listops_oracle(task, read):
    """By Python's own parser, from text; closed lists are those with as many brackets that open as close."""
    words = [LISTOPS_TOKENS[token] for token in read]
    if words[-1] != "]" or sum(word[0] == "[" for word in words) != words.count("]"):
        return None
    names = {"MIN": min, "MAX": max, "MED": lambda v: int(statistics.median(v)), "SM": lambda v: sum(v) % 10}
    python = [f"{word[1:]}([" if word[0] == "[" else "])," if word == "]" else f"{word}," for word in words]
    return eval("".join(python), names)[0]


CASES = [
    *((Induction(hops, n, size), induction_oracle) for hops in (1, 2, 3) for n, size in ((2, 2), (3, 7), (5, 33))),
    *((Induction(hops), induction_oracle) for hops in (1, 2)),
    *((AssociativeRecall(*s), recall_oracle) for s in ((1, 1, 1, 3), (3, 4, 3, 7), (9, 5, 4, 31), (3, 2, 2, 6))),
    (AssociativeRecall(), recall_oracle),
    *((ListOps(*sizes), listops_oracle) for sizes in ((1, 2, 4), (3, 5, 10), (2, 2, 7), (4, 3, 31), (2, 9, 17))),
    (ListOps(), listops_oracle),
]


@pytest.mark.parametrize(("task", "oracle"), CASES, ids=[f"{task.name}-{task.context_length}" for task, _ in CASES])
def test_labels_are_those_of_an_oracle_that_reads_no_further(task, oracle):
    n_scored = 0
    for seed, split in ((0, "train"), (1, "validation"), (2, "test")):
        tokens, labels = task.batch(seed + 3, 5, seed, split)
        assert tokens.dtype == labels.dtype == torch.int64
        assert tokens.shape == labels.shape == (5, task.context_length + 1)
        assert tokens.min() >= 0 and tokens.max() < task.vocab_size
        for row, answers in zip(tokens.tolist(), labels.tolist()):
            expected = [oracle(task, row[: t + 1]) for t in range(task.context_length)]
            assert answers == [IGNORE_INDEX, *(IGNORE_INDEX if answer is None else answer for answer in expected)]
            assert all(answer is None or 0 <= answer < task.vocab_size for answer in expected)
            n_scored += sum(answer is not None for answer in expected)
    assert n_scored > 0


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_a_pure_function_of_their_arguments(name):
    task = make_task(name)
    assert isinstance(task, TASKS[name]) and task.name == name
    draws = []
    for prepare in (lambda: None, lambda: task.batch(1, 4, 3)):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        prepare()
        draws.append((random.random(), np.random.random(), torch.rand(()).item()))
    assert draws[0] == draws[1]  # nobody else's random numbers are touched
    expected = task.batch(7, 4, 3, "validation")
    task.batch(1, 4, 3)
    assert all(map(torch.equal, task.batch(7, 4, 3, "validation"), expected))
    assert all(map(torch.equal, make_task(name).batch(7, 4, 3, "validation"), expected))


@pytest.mark.parametrize("name", TASKS)
def test_no_window_comes_twice(name):
    task = make_task(name)
    streams = [(step, 4, seed, split) for step in range(4) for seed in range(4) for split in SPLITS]
    windows = [tuple(row) for stream in streams for row in task.batch(*stream)[0].tolist()]
    if name == "listops":  # lists of two digits do come twice
        windows = [row for row in windows if PAD not in row[:10]]
    assert len(set(windows)) == len(windows) > 2 * len(streams)
    assert torch.equal(task.batch(2, 4, 1)[0], task.batch(2, 4, 1, "train")[0])


@pytest.mark.parametrize("hops", [1, 2])
def test_later_tokens_do_not_change_the_labels_of_induction(hops):
    task = Induction(hops, 6, 21)
    tokens, labels = task.batch(0, 8, 0)
    other = task.batch(1, 8, 0)[0]
    for t in range(task.context_length):
        changed = torch.cat((tokens[:, : t + 1], other[:, t + 1 :]), dim=1)
        assert torch.equal(task.labels(changed)[:, : t + 2], labels[:, : t + 2])


def test_induction_by_hand():
    tokens = torch.tensor([[3, 1, 2, 3, 3, 2, 1, 9]])
    none = IGNORE_INDEX
    assert Induction(1).labels(tokens).tolist() == [[none, none, none, none, 1, 3, 3, 2]]
    # From the last 1 to the 2 at place 2, which is new; from the last 2 to the 3 at 3, and on to the 1 at 1.
    assert Induction(2).labels(tokens).tolist() == [[none, none, none, none, none, 3, 1, none]]


def test_symbols_are_uniform():
    counts = torch.bincount(Induction(n_symbols=8).batch(0, 200, 0)[0].flatten())
    assert len(counts) == 8 and counts.min() > 0.9 * counts.float().mean()


@pytest.mark.parametrize(("n_pairs", "size"), [(4, 31), (5, 15), (5, 13), (16, 64)])
def test_recall_asks_for_every_key_in_a_new_order_each_round(n_pairs, size):
    tokens, labels = AssociativeRecall(40, 30, n_pairs, size).batch(0, 6, 0)
    orders = []
    for row, answers in zip(tokens.tolist(), labels.tolist()):
        keys, values, queries = row[: 2 * n_pairs : 2], row[1 : 2 * n_pairs : 2], row[2 * n_pairs :]
        assert len(set(keys)) == len(set(values)) == n_pairs and max(keys) < 40 <= min(values)
        assert sum(answer != IGNORE_INDEX for answer in answers) == size - 2 * n_pairs
        rounds = [queries[i : i + n_pairs] for i in range(0, len(queries), n_pairs)]
        assert all(set(asked) == set(keys) for asked in rounds[:-1]) and len(set(rounds[-1])) == len(rounds[-1])
        orders += [tuple(map(keys.index, asked)) for asked in rounds if len(asked) > 2]
    assert len(set(orders)) > len(orders) // 2
    assert tokens[:, : 2 * n_pairs : 2].unique().numel() > n_pairs  # windows have keys and values of their own
    assert tokens[:, 1 : 2 * n_pairs : 2].unique().numel() > n_pairs


def shape_of(expression):
    """(depth, largest number of arguments) of an expression's tokens."""
    open_lists, deepest, most = [], 0, 0
    for token in expression:
        if token == CLOSE:
            most = max(most, open_lists.pop())
        else:
            if open_lists:
                open_lists[-1] += 1
            if token > 9:
                open_lists.append(0)
                deepest = max(deepest, len(open_lists))
    return deepest, most


@pytest.mark.parametrize(("max_depth", "max_args", "size"), [(3, 5, 64), (3, 5, 10), (1, 2, 4), (4, 3, 31)])
def test_expressions_have_the_sizes_asked_for(max_depth, max_args, size):
    tokens, labels = ListOps(max_depth, max_args, size).batch(0, 400, 0)
    depths, most, answers, lengths = Counter(), 0, Counter(), []
    for row, targets in zip(tokens.tolist(), labels.tolist()):
        (scored,) = (place for place, target in enumerate(targets) if target != IGNORE_INDEX)
        expression, answer = row[:scored], targets[scored]
        assert set(row[scored:]) == {PAD} and PAD not in expression
        assert answer == listops_oracle(None, expression)
        depth, n_args = shape_of(expression)
        depths[depth] += 1
        answers[answer] += 1
        most = max(most, n_args)
        lengths.append(len(expression))
    assert sorted(depths) == list(range(1, max_depth + 1))
    assert depths[max_depth] > 400 / (max_depth + 1) * 1.5  # the weights give 2 / (max_depth + 1)
    assert most == max_args and max(lengths) <= size
    assert len(answers) == 10
    if size == 64:
        assert max(answers.values()) < 0.16 * 400 and statistics.mean(lengths) > 20 and max(lengths) > 55
        assert set(range(15)) == set(tokens.unique().tolist()) - {PAD}


def test_nested_arguments_stand_anywhere():
    """Even where the room is short, as it is here, the first arguments do not take it all."""
    tokens, _ = ListOps(2, 5, 10).batch(0, 500, 0)
    first, last = tokens[:, 1], tokens.gather(1, (tokens == PAD).int().argmax(1, keepdim=True) - 2).squeeze(1)
    assert (first > 9).sum() < 1.5 * (last == CLOSE).sum() and (last == CLOSE).sum() > 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MIN 4 2 9 ]", 2),
        ("[MED 1 8 ]", 4),
        ("[MED 9 1 8 ]", 8),
        ("[SM 7 [MAX 2 [MED 5 6 7 ] ] 9 ]", 2),
    ],
)
def test_expressions_by_hand(text, value):
    assert listops_oracle(None, [LISTOPS_TOKENS.index(word) for word in text.split()]) == value


def test_only_scored_positions_count():
    labels = torch.tensor([[5, 2, IGNORE_INDEX, 0], [1, 1, 1, IGNORE_INDEX]])
    logits = torch.zeros(2, 3, 6)
    for row, guesses in enumerate([[2, 3, 4], [1, 0, 5]]):
        for t, guess in enumerate(guesses):
            logits[row, t, guess] = 1.0
    assert count_correct(logits, labels) == (2, 4)
    assert count_correct(logits, torch.full_like(labels, IGNORE_INDEX)) == (0, 0)
    for wrong in (labels[:, 1:], labels[:1], labels[0]):
        with pytest.raises(ValueError, match="must be"):
            count_correct(logits, wrong)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_is_scored_where_the_task_says(name):
    task = make_task(name)
    model = HBLLForCausalLM(HBLLConfig(vocab_size=task.vocab_size, context_length=task.context_length, n_embd=32, n_head=2))
    tokens, labels = task.batch(0, 3, 0)
    read, targets = model.prepare(tokens, labels)
    perfect = torch.nn.functional.one_hot(targets.clamp(min=0), task.vocab_size).float()
    n_scored = int((labels != IGNORE_INDEX).sum())
    assert count_correct(perfect, labels) == (n_scored, n_scored) and n_scored > 0
    assert torch.equal(read, tokens[:, :-1])
    n_correct, n_counted = count_correct(model(read).logits, labels)
    assert 0 <= n_correct < n_counted == n_scored


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: make_task("copying"), "'copying'.*induction, recall, listops"),
        (lambda: Induction(hops=0), "hops=0.*at least 1"),
        (lambda: Induction(n_symbols=1), "n_symbols=1.*at least 2"),
        (lambda: Induction(context_length=1), "context_length=1.*at least 2"),
        (lambda: make_task("induction", hops=1.5), "hops=1.5.*whole"),
        (lambda: Induction(hops=True), "hops=True"),
        (lambda: AssociativeRecall(n_pairs=0), "n_pairs=0"),
        (lambda: AssociativeRecall(n_keys=15), "n_keys=15.*at least 16.*n_pairs=16"),
        (lambda: AssociativeRecall(n_values=15), "n_values=15.*at least 16.*n_pairs=16"),
        (lambda: AssociativeRecall(context_length=32), "context_length=32.*at least 33.*n_pairs=16"),
        (lambda: ListOps(max_depth=0), "max_depth=0"),
        (lambda: ListOps(max_args=1), "max_args=1.*at least 2"),
        (lambda: ListOps(context_length=9), "context_length=9.*at least 10.*max_depth=3"),
        (lambda: Induction().batch(-1, 1, 0), "step=-1.*at least 0"),
        (lambda: Induction().batch(0, 0, 0), "batch_size=0.*at least 1"),
        (lambda: Induction().batch(0, 1, -1), "seed=-1.*at least 0"),
        (lambda: Induction().batch(0, 1, 0, "valid"), "'valid'.*train, validation, test"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(make, match):
    with pytest.raises(ValueError, match=match):
        make()
