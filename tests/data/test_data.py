"""Tokens are cached once, whole or not at all; windows cover them in an order that is a pure function."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hbll_seq.data import text_files
from hbll_seq.data import tokens as data
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import TokenStream, load_tokenizer, load_tokens
from hbll_seq.data.windows import TokenWindows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HBLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HBLL_DATA", raising=False)
    return tmp_path / "cache"


# -- the cache ----------------------------------------------------------------------------------------------------


def make_text(path: Path, n_lines: int = 3000) -> str:
    text = "".join(f" The {i} th line has words , {i * i} .\n" + "\n" * (i % 50 == 0) for i in range(n_lines))
    path.write_text(text, encoding="utf-8")
    return text


def test_tokenised_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_text(tmp_path / "t.txt")
    calls = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *a, **k: calls.append(1) or encode(*a, **k))
    first = load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)
    n_calls = len(calls)
    os.rename(tmp_path / "t.txt", tmp_path / "moved.txt")  # the key is the content, not the name
    again = load_tokens(str(tmp_path / "moved.txt"), "train", tokenizer)
    assert len(calls) == n_calls > 0
    assert np.array_equal(first.tokens, again.tokens) and again.fingerprint == first.fingerprint
    assert (again.n_words, again.n_bytes, again.n_tokens) == (first.n_words, first.n_bytes, first.n_tokens)
    other = Tokenizer.train(["other words\n"] * 5, 270)
    streams = [
        load_tokens(str(tmp_path / "moved.txt"), "train", other),
        load_tokens(str(tmp_path / "moved.txt"), "test", tokenizer),
    ]
    with (tmp_path / "moved.txt").open("a") as file:
        file.write("one line more\n")
    streams.append(load_tokens(str(tmp_path / "moved.txt"), "train", tokenizer))
    assert len({first.fingerprint, *(stream.fingerprint for stream in streams)}) == 4


def test_large_vocabulary_needs_uint32(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_text(tmp_path / "t.txt", 100)
    small = load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)
    monkeypatch.setattr(tokenizer, "vocab_size", 65_537)
    large = load_tokens(str(tmp_path / "t.txt"), "train", tokenizer, cache_dir=tmp_path / "other")
    assert large.tokens.dtype == np.uint32 and np.array_equal(large.tokens, small.tokens)


@pytest.mark.parametrize(("batch_chars", "threads"), [(1, 1), (1000, 2), (1 << 30, 2)])
def test_batches_bound_memory_and_change_nothing(
    batch_chars: int, threads: int, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "train.jsonl"):
        make_text(tmp_path / f"{name}.txt", 60)
    expected = load_tokens(str(tmp_path), "train", tokenizer)
    sizes = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(
        Tokenizer, "encode_batch", lambda self, a, n: sizes.append(sum(map(len, a))) or encode(self, a, n)
    )
    monkeypatch.setattr(data, "BATCH_CHARS", batch_chars)
    monkeypatch.setattr(text_files, "BLOCK", 13)
    stream = load_tokens(str(tmp_path), "train", tokenizer, cache_dir=tmp_path / "other", num_proc=threads)
    assert np.array_equal(stream.tokens, expected.tokens) and stream.n_words == expected.n_words
    assert max(sizes) < batch_chars + 60  # one line more


def test_endless_line_is_cut(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without newlines is not held in memory, counts its words right and survives."""
    from hbll_seq.data import pieces as module

    for owner in (module, text_files):
        monkeypatch.setattr(owner, "MAX_LINE", 10)
    monkeypatch.setattr(text_files, "BLOCK", 64)
    text = "some words of a text and a looooooooooooooooooooooooooooooong one " * 40
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "test.txt").write_text("x\ny\n" * 30)
    stream = load_tokens(str(tmp_path), "test", tokenizer)
    assert stream.n_words == 120
    (tmp_path / "valid.txt").write_text("x")
    stream = load_tokens(str(tmp_path), "train", tokenizer)
    assert tokenizer.decode(stream.tokens) == text and stream.n_words == len(text.split())
    assert np.array_equal(stream.tokens, TokenStream.from_text(text, tokenizer).tokens)


def test_interrupted_build_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    make_text(tmp_path / "t.txt")
    monkeypatch.setattr(data, "BATCH_CHARS", 1000)
    encode, calls = Tokenizer.encode_batch, []

    def interrupted(self: Tokenizer, *args: object) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)
    assert [p.suffix for p in (private_cache / "tokens").iterdir()] == [".lock"]
    assert load_tokens(str(tmp_path / "t.txt"), "train", tokenizer).n_tokens > 1000


@pytest.mark.parametrize("damage", ["cut", "no meta", "bad meta", "no tokens"])
def test_damaged_cache_is_made_again(damage: str, tmp_path: Path, tokenizer: Tokenizer, private_cache: Path) -> None:
    make_text(tmp_path / "t.txt", 200)
    before = np.array(load_tokens(str(tmp_path / "t.txt"), "train", tokenizer).tokens)
    folder = next(p for p in (private_cache / "tokens").iterdir() if p.is_dir())
    stale = folder.with_name(f"{folder.name}.abc.tmp")  # as left by SIGKILL
    stale.mkdir()
    if damage == "cut":
        os.truncate(folder / "tokens.bin", 100)
    elif damage == "bad meta":
        (folder / "meta.json").write_text("{")
    else:
        (folder / {"no meta": "meta.json", "no tokens": "tokens.bin"}[damage]).unlink()
    assert np.array_equal(load_tokens(str(tmp_path / "t.txt"), "train", tokenizer).tokens, before)
    assert not stale.exists()


def test_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_text(tmp_path / "t.txt", 20)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write the token cache .*HBLL_CACHE"):
        load_tokens(str(tmp_path / "t.txt"), "train", tokenizer, cache_dir=tmp_path / "file")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ValueError, match="No space left.*HBLL_CACHE"):
        load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)
    assert [p.suffix for p in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.cache_folder("a/b") == Path("a/b")
    monkeypatch.setenv("HBLL_CACHE", "own")
    assert data.cache_folder() == Path("own")
    monkeypatch.delenv("HBLL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert data.cache_folder() == Path("xdg/hbll_seq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == Path.home() / ".cache" / "hbll_seq"


def test_two_processes_build_the_same_cache(tmp_path: Path, tokenizer: Tokenizer, private_cache: Path) -> None:
    make_text(tmp_path / "t.txt", 4000)
    code = (
        "import sys; from hbll_seq.data import tokens as data; from hbll_seq.data.tokenizer import Tokenizer\n"
        "write = data._write_cache\n"
        "data._write_cache = lambda *a: (print('built'), write(*a))\n"
        "data.BATCH_CHARS = 2000\n"
        "print('ready', flush=True); sys.stdin.readline()\n"  # both start the work at the same moment
        "s = data.load_tokens(sys.argv[1], 'train', Tokenizer.default())\n"
        "print(s.n_tokens, int(s.tokens.sum()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "t.txt")]
    runs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    outputs = [run.communicate(timeout=60)[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    stream = load_tokens(str(tmp_path / "t.txt"), "train", tokenizer)
    assert outputs[0][-1] == outputs[1][-1] == f"{stream.n_tokens} {int(stream.tokens.sum())}"
    assert sum(output.count("built") for output in outputs) == 1
    assert sorted(p.suffix for p in (private_cache / "tokens").iterdir()) == ["", ".lock"]


def test_cached_tokenizer_of_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_text(tmp_path / "t.txt", 300)
    one = load_tokenizer(str(tmp_path / "t.txt"), 290)
    assert one.vocab_size == 290 and "training a tokenizer of 290 pieces" in capsys.readouterr().err
    assert load_tokenizer(str(tmp_path / "t.txt"), 290).fingerprint == one.fingerprint
    assert capsys.readouterr().err == ""
    assert load_tokenizer(str(tmp_path / "t.txt"), 291).vocab_size == 291
    with pytest.raises(ValueError, match="largest possible value"):
        load_tokenizer(str(tmp_path / "t.txt"), 50_000)


# -- windows ------------------------------------------------------------------------------------------------------


def counting_stream(n_tokens: int) -> TokenStream:
    return TokenStream(np.arange(n_tokens, dtype=np.uint16), 1, 1, "none")


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 24, 25, 100, 1001])
def test_an_epoch_holds_every_window_once(n_tokens: int) -> None:
    windows = TokenWindows(counting_stream(n_tokens), context_length=8)
    offsets = set()
    for epoch in range(60):
        offset, order = windows.epoch_order(3, epoch)
        offsets.add(offset)
        assert sorted(order) == list(range(windows.n_windows))
        starts = [int(windows.batch(epoch * windows.n_windows + i, 1, 3)[0, 0]) for i in range(windows.n_windows)]
        assert starts == [offset + 8 * i for i in order]
        assert max(starts) + 9 <= n_tokens
    assert windows.n_windows >= max(1, n_tokens // 8 - 2) and len(offsets) > min(7, n_tokens - 9) // 2


def test_orders_are_pure_and_differ() -> None:
    windows = TokenWindows(counting_stream(5000), 4)
    orders = {
        key: (windows.epoch_order(*key)[0], tuple(windows.epoch_order(*key)[1]))
        for key in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(set(orders.values())) == 4
    fresh = TokenWindows(counting_stream(5000), 4)
    for key in reversed(orders):
        offset, order = fresh.epoch_order(*key)
        assert (offset, tuple(order)) == orders[key]


def test_batches_are_the_same_on_any_number_of_ranks() -> None:
    windows = TokenWindows(counting_stream(200), 8)  # 24 windows: a batch of 10 crosses epochs
    for step in range(12):
        whole = windows.batch(step, 10, seed=5)
        assert whole.shape == (10, 9) and whole.dtype == torch.int64
        parts = [windows.batch(step, 5, 5, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(torch.cat([windows.batch(step * 2 + half, 5, 5) for half in range(2)]), whole)
    assert torch.equal(pickle.loads(pickle.dumps(windows)).batch(11, 10, seed=5), whole)  # for a loader's workers


def test_batch_larger_than_many_epochs() -> None:
    windows = TokenWindows(counting_stream(9), 8)
    assert windows.n_windows == 1
    assert torch.equal(windows.batch(7, 6, 0), torch.arange(9).expand(6, 9))


@pytest.mark.parametrize("n_tokens", [9, 10, 17, 18, 57, 64, 65, 66])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluation_predicts_every_token_once(n_tokens: int, batch_size: int) -> None:
    batches = list(TokenWindows(counting_stream(n_tokens), 8).evaluation_batches(batch_size))
    assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, n_tokens))
    for batch in batches:
        assert batch.dtype == torch.int64 and batch.shape[0] <= batch_size and 2 <= batch.shape[1] <= 9
        assert (batch[:, 1:] - batch[:, :-1] == 1).all()  # every target stands behind its own context
    assert all(batch.shape[1] == 9 for batch in batches[:-1])


@pytest.mark.parametrize("n_rows", [1, 3, 7, 24])
def test_contiguous_rows_go_on_where_they_ended(n_rows: int) -> None:
    windows = TokenWindows(counting_stream(500), 20)
    assert windows.n_windows == 24
    batches = [windows.contiguous_batch(step, range(n_rows), n_rows, seed=3) for step in range(60)]
    for before, after in zip(batches, batches[1:]):
        ends, starts = before[:, -1], after[:, 0]
        wrapped = ends != starts
        assert wrapped.sum() <= 1 and all(start == batches_min(batches) for start in starts[wrapped])
    one_pass = torch.cat(batches[: -(-24 // n_rows)])[:, 0].unique()
    assert len(one_pass) == 24  # every window in n_windows / n_rows steps
    assert len(torch.cat(batches[:1])[:, 0].unique()) == n_rows
    for rows in (range(0, 1), range(n_rows - 1, n_rows)):  # a process or micro batch has rows of the same batch
        assert torch.equal(windows.contiguous_batch(5, rows, n_rows, 3), batches[5][rows.start : rows.stop])
    assert not torch.equal(windows.contiguous_batch(0, range(n_rows), n_rows, 4), batches[0])


def batches_min(batches: list[torch.Tensor]) -> int:
    return min(int(batch[:, 0].min()) for batch in batches)


@pytest.mark.parametrize("n_tokens, n_rows", [(21, 4), (22, 1), (400, 4), (401, 4), (417, 3), (9, 2), (2000, 16)])
def test_contiguous_evaluation_predicts_every_token_once(n_tokens: int, n_rows: int) -> None:
    windows = TokenWindows(counting_stream(n_tokens), min(20, n_tokens - 1))
    batches = list(windows.contiguous_evaluation_batches(n_rows))
    assert sorted(torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist()) == list(range(1, n_tokens))
    for before, after in zip(batches, batches[1:]):
        assert torch.equal(before[-len(after) :, -1], after[:, 0]) and len(before) in (n_rows, 1)
    some = torch.cat([batch[:, 1:].flatten() for batch in windows.contiguous_evaluation_batches(n_rows, n_rows)])
    plain = torch.cat([batch[:, 1:].flatten() for batch in itertools.islice(windows.evaluation_batches(n_rows), 1)])
    assert sorted(some.tolist()) == sorted(plain.tolist()) or n_tokens < 20 * n_rows  # a limit names the same tokens


def test_windows_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match=r"has 8 tokens.*context_length \+ 1 = 9.*smaller context_length"):
        TokenWindows(counting_stream(8), 8)
    for context_length in (0, -3):
        with pytest.raises(ValueError, match=f"context_length={context_length}"):
            TokenWindows(counting_stream(8), context_length)
    windows = TokenWindows(counting_stream(100), 8)
    for arguments in [(-1, 4, 0), (0, 0, 0), (0, 4, 0, 2, 2), (0, 4, 0, -1, 2), (0, 4, -1)]:
        with pytest.raises(ValueError, match="must"):
            windows.batch(*arguments)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(windows.evaluation_batches(0))


def test_stream_from_text(tokenizer: Tokenizer) -> None:
    stream = TokenStream.from_text("a b\n\u00e9", tokenizer)
    assert stream.tokens.tolist() == [tokenizer.eos_id, *tokenizer.encode("a b\n\u00e9"), tokenizer.eos_id]
    assert (stream.n_words, stream.n_bytes) == (4, 6)
    assert TokenStream.from_text("", tokenizer).tokens.tolist() == [tokenizer.eos_id] * 2
