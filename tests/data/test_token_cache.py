"""A cache is used as it was written or made again; reading it needs no lock, and survives what others do to its files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from helpers.cache_entries import entry, flip, load, same

from hbll_seq.data import token_cache
from hbll_seq.data import tokens as data
from hbll_seq.data.sources import Corpus
from hbll_seq.data.tokenizer import Tokenizer
from hbll_seq.data.tokens import load_tokenizer


def change_meta(folder: Path, **values: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **values}))


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def zero_page(folder: Path) -> None:
    with (folder / "tokens.bin").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


DAMAGES = {
    "zeroed page": zero_page,
    "flipped bit of an id": lambda folder: flip(folder / "tokens.bin", 12_345),
    "n_words": lambda folder: change_meta(folder, n_words=7),
    "n_bytes": lambda folder: change_meta(folder, n_bytes=7),
    "n_tokens": lambda folder: change_meta(folder, n_tokens=7),
    "dtype": lambda folder: change_meta(folder, dtype="int16"),
    "dtype of no name": lambda folder: change_meta(folder, dtype=[]),
    "sum": lambda folder: change_meta(folder, sha256="0" * 64),
    "sum of the values": lambda folder: change_meta(folder, meta_sha256=None),
    "two values exchanged": lambda folder: change_meta(folder, n_words=20_000, n_bytes=3_000),
    "deep nesting": lambda folder: (folder / "meta.json").write_text("[" * 100_000),
    "a list": lambda folder: (folder / "meta.json").write_text("[]"),
    "a pipe": lambda folder: replace_by_pipe(folder / "tokens.bin"),
    "a pipe as values": lambda folder: replace_by_pipe(folder / "meta.json"),
    "a file as folder": lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
    "a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
    "longer": lambda folder: (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes() + b"\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_changed_bytes_are_made_again(
    damage: str, text: str, tokenizer: Tokenizer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = load(text, tokenizer, cache), entry(cache)
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert capsys.readouterr().err == ""
    DAMAGES[damage](folder)
    assert same(load(text, tokenizer, cache), whole)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "made again" in said and folder.name in said and len(said) < 500
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact
    assert same(load(text, tokenizer, cache), whole) and capsys.readouterr().err == ""


def test_any_flipped_bit_is_found(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    whole, folder = load(text, tokenizer, cache), entry(cache)
    rng = random.Random(0)
    for _ in range(60):
        path = folder / rng.choice(["tokens.bin", "meta.json"])
        flip(path, rng.randrange(8 * path.stat().st_size))
        assert same(load(text, tokenizer, cache), whole)


def test_an_id_outside_the_vocabulary_never_gets_out(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    """Even where somebody wrote it with the right sums."""
    whole, folder = load(text, tokenizer, cache), entry(cache)
    ids = np.fromfile(folder / "tokens.bin", dtype=np.uint16)
    ids[100] = tokenizer.vocab_size
    ids.tofile(folder / "tokens.bin")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["meta_sha256"]
    meta["sha256"] = hashlib.sha256(ids).hexdigest()
    (folder / "meta.json").write_text(token_cache.seal(meta))
    assert same(load(text, tokenizer, cache), whole)


def test_bytes_are_checked_once_a_process(
    text: str, tokenizer: Tokenizer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen by a change that leaves the file's time as it was; a change of the time is followed by another look."""
    whole, path = load(text, tokenizer, cache), entry(cache) / "tokens.bin"
    before = time.time_ns() - 10**10
    os.utime(path, ns=(before, before))
    load(text, tokenizer, cache)
    flip(path, 2000)
    os.utime(path, ns=(before, before))
    assert not same(load(text, tokenizer, cache), whole)
    path.touch()
    assert same(load(text, tokenizer, cache), whole) and "made again" in capsys.readouterr().err


# -- caches of older versions, and those that cannot be written ---------------------------------------------------


def make_old(folder: Path) -> None:
    """As versions without sums wrote it."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if "sha256" not in k}, indent=1))


def block_lock(path: Path) -> None:
    """Nobody, root included, gets a lock there: as in a folder that cannot be written."""
    lock = path.with_name(f"{path.name}.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()


def test_cache_of_an_older_version_gets_sums(
    text: str, tokenizer: Tokenizer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = load(text, tokenizer, cache), entry(cache)
    intact = (folder / "meta.json").read_bytes()
    make_old(folder)
    assert same(load(text, tokenizer, cache), whole) and "has no sums" in capsys.readouterr().err
    assert (folder / "meta.json").read_bytes() == intact and entry(cache) == folder
    assert same(load(text, tokenizer, cache), whole) and capsys.readouterr().err == ""


def test_what_is_there_is_opened_without_a_lock(
    text: str, tokenizer: Tokenizer, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = load(text, tokenizer, cache), entry(cache)
    trained = load_tokenizer(text, 300, cache_dir=cache)
    model = next((cache / "tokenizers").glob("*.model"))
    block_lock(folder)
    block_lock(model)
    capsys.readouterr()
    assert same(load(text, tokenizer, cache), whole)
    assert load_tokenizer(text, 300, cache_dir=cache).fingerprint == trained.fingerprint
    assert capsys.readouterr().err == ""
    make_old(folder)
    model.with_name(f"{model.name}.sha256").unlink()
    assert same(load(text, tokenizer, cache), whole)
    assert load_tokenizer(text, 300, cache_dir=cache).fingerprint == trained.fingerprint
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("used as it is" in line for line in said)
    for damaged in (folder / "tokens.bin", model):
        os.truncate(damaged, 100)
    with pytest.raises(ValueError, match="cannot write the token cache .* is broken .* HBLL_CACHE"):
        load(text, tokenizer, cache)
    with pytest.raises(ValueError, match="cannot write the cached tokenizer .* is broken .* HBLL_CACHE"):
        load_tokenizer(text, 300, cache_dir=cache)


def test_old_cache_of_foreign_ids_is_not_used_as_it_is(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    load(text, tokenizer, cache)
    folder = entry(cache)
    make_old(folder)
    ids = np.fromfile(folder / "tokens.bin", dtype=np.uint16)
    ids[-1] = 60_000
    ids.tofile(folder / "tokens.bin")
    block_lock(folder)
    with pytest.raises(ValueError, match="holds the id 60000, but the vocabulary ends at 4095"):
        load(text, tokenizer, cache)


def test_old_cache_is_used_where_the_text_cannot_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def opened(without_sums: bool = False) -> str:
        if not without_sums:
            raise token_cache.WithoutSums("has no sums")
        return "tokens"

    def make(found: token_cache.NotUsable) -> None:
        raise ValueError("the Hub cannot be reached")

    assert data._cached("token cache", tmp_path / "key", opened, make) == "tokens"
    assert "cannot get any (the Hub cannot be reached); it is used as it is" in capsys.readouterr().err


def test_text_that_cannot_be_read_is_no_fault_of_the_cache(tokenizer: Tokenizer, cache: Path) -> None:
    def segments():
        yield "some text\n"
        raise OSError(5, "Input/output error")

    cache.mkdir()
    with pytest.raises(ValueError, match="cannot read data 'my text': .*Input/output error"):
        data._write_cache(cache / "key", "fingerprint", Corpus("my text", "digest", None, segments), tokenizer, 1)
    assert not any(cache.iterdir())


# -- cached tokenizers --------------------------------------------------------------------------------------------


def test_broken_tokenizer_is_trained_again(text: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = load_tokenizer(text, 300, cache_dir=cache)
    path = next((cache / "tokenizers").glob("*.model"))
    sums = path.with_name(f"{path.name}.sha256")
    intact = path.read_bytes(), sums.read_bytes()
    rng = random.Random(0)
    damages = [lambda: flip(path, rng.randrange(8 * len(intact[0]))) for _ in range(20)]
    damages += [lambda: flip(sums, rng.randrange(8 * len(intact[1]))) for _ in range(5)]
    damages += [lambda: path.write_bytes(b""), lambda: sums.write_bytes(b""), lambda: replace_by_pipe(path)]
    damages += [lambda: path.write_bytes(Tokenizer.train(["a b c\n"], 264).model_proto)]
    damages += [lambda: (path.unlink(), path.mkdir(), (path / "x").touch())]
    for damage in damages:
        damage()
        capsys.readouterr()
        assert load_tokenizer(text, 300, cache_dir=cache).fingerprint == trained.fingerprint
        assert capsys.readouterr().err.count("trained again") == 1
        assert (path.read_bytes(), sums.read_bytes()) == intact


def test_tokenizer_of_an_older_version_gets_a_sum(text: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is kept: another release of SentencePiece might learn another vocabulary than a user's models have."""
    load_tokenizer(text, 300, cache_dir=cache)
    path = next((cache / "tokenizers").glob("*.model"))
    other = Tokenizer.train([Path(text).read_text().upper()], 300)
    path.write_bytes(other.model_proto)
    path.with_name(f"{path.name}.sha256").unlink()
    capsys.readouterr()
    assert load_tokenizer(text, 300, cache_dir=cache).fingerprint == other.fingerprint
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "has no sum" in said
    assert load_tokenizer(text, 300, cache_dir=cache).fingerprint == other.fingerprint and capsys.readouterr().err == ""
    flip(path, 5000)
    assert load_tokenizer(text, 300, cache_dir=cache).fingerprint != other.fingerprint  # now a change is found


# -- killed processes ---------------------------------------------------------------------------------------------

KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
from hbll_seq.data import tokens as data
from hbll_seq.data.tokenizer import Tokenizer

data.BATCH_CHARS = 500
text, cache = sys.argv[1], sys.argv[2]
tokenizer = Tokenizer.default()

def work():
    trained = data.load_tokenizer(text, 300, cache_dir=cache)
    stream = data.load_tokens(text, "train", tokenizer, cache_dir=cache)
    return trained.fingerprint, stream.n_words, stream.n_bytes, stream.tokens.tolist()

def paths():
    return sorted(str(p.relative_to(cache)) for p in Path(cache).rglob("*") if p.suffix != ".lock")

work()
shutil.rmtree(cache)
start = time.monotonic()
whole = work()
lasts, names, rng, killed = time.monotonic() - start, paths(), random.Random(0), 0
for round in range(14):
    for name in names:  # now and then an earlier build is there, whole or broken
        path = Path(cache, name)
        if path.is_file() and rng.random() < 0.8:
            os.truncate(path, rng.randrange(path.stat().st_size)) if rng.random() < 0.5 else path.unlink()
    children = []
    for _ in range(2):  # two build at once
        if not (child := os.fork()):
            try:
                work()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        time.sleep(rng.random() * lasts / 2)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert work() == whole, "other tokens"
    assert paths() == names, paths()
print(killed)
"""


def test_killed_builds_are_made_good(text: str, cache: Path) -> None:
    """Two processes that build the same cache are killed at random moments; the next call needs no help."""
    run = subprocess.run([sys.executable, "-c", KILLED, text, str(cache)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 3


def test_leftovers_are_swept(text: str, tokenizer: Tokenizer, cache: Path) -> None:
    tokens, tokenizers = cache / "tokens", cache / "tokenizers"
    old = time.time() - 2 * token_cache.STALE_AFTER_S

    def leave(path: Path, age: float, written: float | None = None) -> Path:
        path.mkdir(parents=True)
        (path / "tokens.bin").write_bytes(b"x")
        os.utime(path / "tokens.bin", (written or age, written or age))
        os.utime(path, (age, age))
        return path

    stale = [leave(tokens / f"{'a' * 32}.x1.tmp", old), leave(tokenizers / f".aside-{'b' * 32}.model.12345678", old)]
    living = [
        leave(tokens / f"{'c' * 32}.x1.tmp", time.time()),
        leave(tokens / f"{'d' * 32}.x1.tmp", old, written=time.time()),  # made long ago, and still written to
        leave(tokens / f"{'e' * 32}.x1.tmp", old),  # its writer holds the lock
        leave(tokens / "another", old),
        leave(tokens / "notes.tmp", old),  # of somebody else
        leave(tokens / ".tmp", old),
    ]
    with FileLock(tokens / f"{'e' * 32}.lock"):
        load(text, tokenizer, cache)
        load_tokenizer(text, 300, cache_dir=cache)
    assert not any(path.exists() for path in stale) and all(path.exists() for path in living)
    key = entry_key(cache, text, tokenizer)
    shutil.rmtree(tokens / key)
    own = leave(tokens / f"{key}.x1.tmp", time.time())  # of the same text: whoever left it holds the lock no more
    load(text, tokenizer, cache)
    assert not own.exists()


def entry_key(cache: Path, text: str, tokenizer: Tokenizer) -> str:
    return load(text, tokenizer, cache).fingerprint[:32]
