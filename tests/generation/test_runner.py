"""The runner against the full forward: every path, padding, windows that slide, tokens taken back, rows of several depths."""

import pytest
import torch
from helpers.language_models import CONTEXT_LENGTH, model_of

from hbll_seq.generation.runner import Runner
from hbll_seq.tree.topology import DyadicTree

PATHS = DyadicTree(3).paths()
MIXED = ("transformer", "gru", "mingru", "transformer", "elman", "transformer", "elman-sigmoid")
MODELS = {
    "attention": {},
    "layernorm": dict(norm="layernorm"),
    "gru": dict(cell="gru"),
    "mingru": dict(cell="mingru", mlp_ratio=0),
    "mixed": dict(cell=MIXED),
    "exits": dict(exit_rank=3, exit_by="depth"),
    "untied": dict(tie_embeddings=False, n_head=4),
    "grouped": dict(n_embd=32, n_head=4, n_kv_head=2, mlp="swiglu", qk_norm=True),
}
FULL = (1, 2, 3, 4, 5, 6, 7)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def ids_of(batch, length, seed=0):
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), float((a - b).abs().max())


def check_steps(model, runner, ids, n_prompt, full, skip=0):
    """Logits after the prompt and after every later token are ``full`` [B, T, V] of the plain network."""
    close(runner.prefill(ids[:, :n_prompt]), full[:, n_prompt - 1])
    for t in range(n_prompt, ids.shape[1]):
        close(runner.step(ids[:, t]), full[:, t])
    assert runner.length == ids.shape[1]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_path_equals_the_full_forward(path):
    """From the prompt's end to more than twice the window, for a prompt of one token, too."""
    model, ids = model_of(), ids_of(2, 30)
    full = model(ids, path=path).logits
    for n_prompt in (1, 5):
        check_steps(model, Runner(model, path), ids, n_prompt, full)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kind_of_block_equals_the_full_forward(kind, batch):
    model, ids = model_of(**MODELS[kind]), ids_of(batch, 40)
    full = model(ids).logits
    for n_prompt in (1, CONTEXT_LENGTH, 20):  # below, at and above the window
        check_steps(model, Runner(model, FULL), ids, n_prompt, full)


@pytest.mark.parametrize("kind", MODELS)
def test_left_padding_changes_nothing(kind):
    """Rows with none, some and nearly all of the prompt as padding, until the padding is far out of the window."""
    model, pads, length = model_of(**MODELS[kind]), [0, 4, 8], 9
    ids = ids_of(3, 40)
    runner = Runner(model, FULL, torch.tensor(pads))
    rows = [model(ids[row : row + 1, pad:]).logits[0] for row, pad in enumerate(pads)]
    logits = runner.prefill(ids[:, :length])
    for t in range(length, 40):
        for row, pad in enumerate(pads):
            close(logits[row], rows[row][t - 1 - pad])
        logits = runner.step(ids[:, t])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pads", [None, [0, 3]])
def test_several_tokens_at_once_equal_one_by_one(kind, pads):
    model, ids = model_of(**MODELS[kind]), ids_of(2, 60)
    start = None if pads is None else torch.tensor(pads)
    one, several = Runner(model, FULL, start), Runner(model, FULL, start)
    close(several.prefill(ids[:, :6]), one.prefill(ids[:, :6]))
    t, sizes = 6, [2, 1, 5, 3, 1, CONTEXT_LENGTH + 5, 2, 4]
    for size in sizes:
        logits = several.read(ids[:, t : t + size])
        close(logits, torch.stack([one.step(ids[:, t + k]) for k in range(size)], dim=1))
        t += size
    assert several.length == one.length == t


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pads", [None, [0, 3]])
def test_tokens_taken_back_were_never_read(kind, pads):
    """Drafts of 1 to 5 tokens of which some are taken back, by step and by read, until the window has slid far."""
    model, ids = model_of(**MODELS[kind]), ids_of(2, 90)
    start = None if pads is None else torch.tensor(pads)
    plain, runner = Runner(model, FULL, start), Runner(model, FULL, start, rollback=6)
    plain.prefill(ids[:, :5])
    runner.prefill(ids[:, :5])
    t = 5
    for turn in range(28):
        wrong = ids_of(2, 1 + turn % 5, seed=turn)
        if turn % 2:
            runner.read(wrong)
        else:
            for k in range(wrong.shape[1]):
                runner.step(wrong[:, k])
        runner.truncate(t)
        assert runner.length == t
        n = 1 + turn % 3
        close(runner.read(ids[:, t : t + n]), torch.stack([plain.step(ids[:, t + k]) for k in range(n)], dim=1))
        t += n


def test_truncate_takes_back_a_part_of_what_was_read_at_once():
    for kind in MODELS:
        model, ids = model_of(**MODELS[kind]), ids_of(2, 30)
        full = model(ids).logits
        runner = Runner(model, FULL)
        runner.prefill(ids[:, :20])
        runner.read(torch.cat((ids[:, 20:23], ids_of(2, 4, seed=9)), dim=1))
        runner.truncate(23)
        close(runner.read(ids[:, 23:]), full[:, 23:])


DEPTHS = [(4,), FULL, (4, 6, 7), (2, 4, 6), (4,), (1, 2, 4, 6, 7)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pads", [None, [0, 3, 1, 6, 0, 2]])
def test_rows_of_several_depths_equal_each_alone(kind, pads):
    model, ids = model_of(**MODELS[kind]), ids_of(6, 34)
    together = Runner(model, DEPTHS, None if pads is None else torch.tensor(pads))
    alone = [Runner(model, path, None if pads is None else torch.tensor(pads[r : r + 1])) for r, path in enumerate(DEPTHS)]
    close(together.prefill(ids[:, :7]), torch.cat([one.prefill(ids[r : r + 1, :7]) for r, one in enumerate(alone)]))
    for t in range(7, 30):
        close(together.step(ids[:, t]), torch.cat([one.step(ids[r : r + 1, t]) for r, one in enumerate(alone)]))
    together.truncate(27)
    for one in alone:
        one.truncate(27)
    close(together.read(ids[:, 27:]), torch.cat([one.read(ids[r : r + 1, 27:]) for r, one in enumerate(alone)]))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("paths", [FULL, DEPTHS], ids=["one path", "several"])
def test_rows_that_are_kept_go_on(kind, paths):
    """Rows go, come in another order and double."""
    model, ids = model_of(**MODELS[kind]), ids_of(6, 30)
    pads = torch.tensor([0, 3, 1, 6, 0, 2])
    runner, reference = Runner(model, paths, pads), Runner(model, paths, pads)
    runner.prefill(ids[:, :8])
    reference.prefill(ids[:, :8])
    rows, t = list(range(6)), 8
    for kept in ([5, 1, 3, 2], [0, 1, 3], [2, 2, 0]):
        runner.keep(kept)
        rows = [rows[r] for r in kept]
        for _ in range(5):
            close(runner.step(ids[rows, t]), reference.step(ids[:, t])[rows])
            t += 1
        for one in (runner, reference):
            one.truncate(t - 2)
        close(runner.read(ids[rows, t - 2 : t]), reference.read(ids[:, t - 2 : t])[rows])


def calls_of(model):
    """How many rows and tokens each block reads, by instruments at its decoder's door."""
    counts = dict.fromkeys(range(1, 8), 0)
    for n, block in enumerate(model.blocks, start=1):
        make = block.decoder

        def instrumented(*args, n=n, make=make, **options):
            decoder = make(*args, **options)
            read, step = decoder.read, decoder.step

            def counted_read(x):
                if not busy:
                    counts[n] += x.shape[0] * x.shape[1]
                busy.append(1)
                y = read(x)
                busy.pop()
                return y

            def counted_step(x):
                if not busy:
                    counts[n] += x.shape[0]
                busy.append(1)
                y = step(x)
                busy.pop()
                return y

            busy = []
            decoder.read, decoder.step = counted_read, counted_step
            return decoder

        block.decoder = instrumented
    return counts


@pytest.mark.parametrize("draft", [(1, 2, 3, 4), (4, 6), (2, 4), (1, 2, 3, 4, 6)])
def test_a_draft_and_its_verification_share_what_they_begin_with(draft):
    model, ids = model_of(), ids_of(2, 80)
    counts = calls_of(model)
    full, short = model(ids).logits, model(ids, path=draft).logits
    runner = Runner(model, FULL, also=[draft], rollback=8)
    close(runner.prefill(ids[:, :6]), full[:, 5])
    assert runner.length == runner.position(draft) == 6
    t, read = 6, 6
    for turn in range(14):
        n_draft, n_right = 1 + turn % 4, turn % 3
        n_right = min(n_right, n_draft)
        tokens = torch.cat((ids[:, t : t + 1 + n_right], ids_of(2, n_draft - n_right, seed=turn)), dim=1)
        lag = runner.length - runner.position(draft)
        if lag > 0:
            close(runner.read(ids[:, t - lag : t], draft), short[:, t - lag : t])
        for k in range(n_draft):
            logits = runner.step(tokens[:, k], draft)
            if k <= n_right:
                close(logits, short[:, t + k])
        logits = runner.read(tokens)
        read += n_draft + 1
        close(logits[:, : n_right + 1], full[:, t : t + n_right + 1])
        t += n_right + 1
        runner.truncate(t)
        assert runner.length == t
    shared = [n for k, n in enumerate(draft) if draft[: k + 1] == FULL[: k + 1]]
    assert all(counts[n] == 2 * read for n in shared)  # once for each token, not once for each path
    assert shared or counts[4] > 2 * read


@pytest.mark.parametrize("short", [(1, 2, 3, 4), (1, 2, 3)])
def test_a_guess_by_hand_leaves_no_trace_once_it_is_truncated(short):
    """The late blocks are stepped on a guess of their inputs, taken back, and the path is read on."""
    model, ids = model_of(), ids_of(2, 30)
    full = model(ids).logits
    runner = Runner(model, FULL, also=[short])
    runner.prefill(ids[:, :6])
    for t in range(6, 30, 4):
        for k in range(3):
            state = runner.states(ids[:, t + k : t + k + 1], short)[:, 0]
            for n in FULL[len(short) :]:
                runner.decoder(FULL[:n]).step(state)
        for n in FULL[len(short) :]:
            runner.decoder(FULL[:n]).truncate(t)
        close(runner.read(ids[:, t : t + 4]), full[:, t : t + 4])


def test_bfloat16_runs():
    for kind in MODELS:
        model, ids = model_of(**MODELS[kind]).bfloat16(), ids_of(2, 24)
        full = model(ids).logits.float()
        runner = Runner(model, FULL, torch.tensor([0, 0]))
        logits = [runner.prefill(ids[:, :6])] + [runner.step(ids[:, t]) for t in range(6, 24)]
        assert logits[0].dtype == torch.bfloat16
        difference = (torch.stack(logits, dim=1).float() - full[:, 5:]).abs().mean()
        assert difference < 0.05 * full.abs().mean(), (kind, difference, full.abs().mean())


def test_a_runner_sees_the_weights_it_was_made_with():
    """A new runner after training steps gives the new weights' logits: nothing prepared outlives its runner."""
    model, ids = model_of(), ids_of(1, 8)
    before = Runner(model, FULL).prefill(ids)
    for p in model.parameters():
        p.mul_(1.1)
    after = Runner(model, FULL).prefill(ids)
    close(after, model(ids).logits[:, -1])
    assert (after - before).abs().max() > 1e-3


def test_mistakes_are_named():
    model, ids = model_of(), ids_of(2, 20)
    with pytest.raises(ValueError, match="4 -> 7"):
        Runner(model, (4, 7))
    with pytest.raises(ValueError, match="rows of different paths"):
        Runner(model, [(4,), (4, 6)], also=[(4,)])
    runner = Runner(model, (4, 6), rollback=3)
    runner.prefill(ids)
    with pytest.raises(ValueError, match=r"path=\[4\].*\(4, 6\)"):
        runner.read(ids, (4,))
    with pytest.raises(ValueError, match="length=21.*0 to 20"):
        runner.truncate(21)
    with pytest.raises(ValueError, match="length=16.*rollback above 3"):
        runner.truncate(16)
    runner.truncate(18)
    with pytest.raises(ValueError, match="length=16.*positions from 17"):
        runner.truncate(16)  # what lies before may be gone, step by step, too
    with pytest.raises(ValueError, match="no path of this runner"):
        runner.decoder((1,))
    with pytest.raises(ValueError, match="a runner for each path"):
        Runner(model, [(4,), (4, 6)]).decoder((4,))
