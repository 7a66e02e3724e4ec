"""A data set that is downloaded by the real libraries, through the Hub's own interface: from a stand-in on this machine."""

import io
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
from helpers.hub_server import Repository, standing_in

# the card and the file names of Salesforce/wikitext, as the Hub shows them
CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
  - split: train
    path: wikitext-103-raw-v1/train-*
  - split: validation
    path: wikitext-103-raw-v1/validation-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train-*
---
"""
ARTICLE = ["", " = {0} = \n", "", " The {0} flows into the sea .\n", "", " = = Course = = \n", "", " It is long .\n"]
LOAD = """
from hbll_seq.data import sources
for split in ("train", "validation", "test"):
    lines = list(sources.open_corpus("wikitext-103", split).segments())
    print(split, lines.count(None), sum("flows" in line for line in lines if line))
"""


def rows_of(*names):
    return [line.format(name) for name in names for line in ARTICLE]


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), file)
    return file.getvalue()


def test_wikitext_103_in_the_layout_of_the_hub(tmp_path):
    """Nothing of the libraries is replaced; the second time, the Hub is gone and its cache answers."""
    with standing_in() as server:
        repository = server.repositories["datasets/Salesforce/wikitext"] = Repository(private=False)
        folder = "wikitext-103-raw-v1"
        repository.commit("main", {
            "README.md": CARD.encode(),
            f"{folder}/test-00000-of-00001.parquet": parquet(rows_of("Ems")),
            f"{folder}/train-00000-of-00002.parquet": parquet(rows_of("Elbe", "Oder", "Main")),
            f"{folder}/train-00001-of-00002.parquet": parquet(rows_of("Rhine", "Isar")),
            f"{folder}/validation-00000-of-00001.parquet": parquet(rows_of("Inn", "Lahn")),
            "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet(rows_of("none of ours")),
        })  # fmt: skip
        offline = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HBLL_DATA"}
        env = {name: value for name, value in os.environ.items() if name not in offline}
        env |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "HBLL_CACHE": str(tmp_path / "cache")}
        found = load(env)
        downloaded = [path for command, path in server.asked if command == "GET" and path.endswith(".parquet")]
    assert found == ["train 5 5", "validation 2 2", "test 1 1"]
    assert len(downloaded) == 4 and not any("wikitext-2-raw" in path for path in downloaded)
    assert load(env) == found


def load(env):
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
