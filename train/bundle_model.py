"""Make the model that the package brings along from a finished run.

By hand: ``python train/lm.py --preset bundled --output-dir runs/bundled && python train/bundle_model.py runs/bundled``.

The weights are rounded to bfloat16, which halves the file; every figure of the card is measured on the rounded weights, on
whole splits. ``tests/models/bundled_expected.json`` gets what a test compares the loaded model with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hbll_seq import HBLLForCausalLM, TokenWindows, evaluate_paths, load_tokens
from hbll_seq.evaluation.perplexity import format_table
from hbll_seq.models.model_files import CARD_NAME, METRICS_NAME

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "hbll_seq" / "assets" / "bundled"
EXPECTED = ROOT / "tests" / "models" / "bundled_expected.json"
#: windows of the test split that the test evaluates, and the prompt that it continues
WINDOWS, PROMPT = 4, "The history of the city"
AUTO_IMPORT = "from hbll_seq.integrations.transformers import BUNDLED\n"
COMMAND = "python train/lm.py --preset bundled, then python train/bundle_model.py"


def main() -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of train/lm.py")
    run = parser.parse_args().run
    summary = json.loads((run / METRICS_NAME).read_text(encoding="utf-8"))
    model = HBLLForCausalLM.from_pretrained(run, dtype="bfloat16")
    rounded = HBLLForCausalLM(model.config, model.tokenizer).eval()
    rounded.load_state_dict(model.state_dict())  # in float32: what generation computes in on a CPU
    splits = {
        split: TokenWindows(load_tokens("bundled", split, model.tokenizer), model.config.context_length)
        for split in ("validation", "test")
    }
    rows = {split: evaluate_paths(rounded, windows, batch_size=4) for split, windows in splits.items()}
    for split, table in rows.items():
        print(f"\n{split}\n{format_table(table)}")
    first = evaluate_paths(rounded, splits["test"], batch_size=WINDOWS, max_batches=1)
    expected = {
        "losses": {row["depth"]: row["loss"] for row in first},
        "text": {depth: rounded.generate(PROMPT, depth=depth, temperature=0, max_new_tokens=12) for depth in (1, 3, 7)},
    }
    shown = {name: value for name, value in summary["settings"].items() if value is not None and name != "output_dir"}
    model.save_pretrained(
        FOLDER, data="WikiText-2 (hbll_seq/assets)", perplexity=rows, settings=shown,
        model_name="hbll_seq's bundled language model", license="cc-by-sa-3.0", language="en", command=COMMAND,
        steps=summary["step"], tokens=summary["tokens"],
    )
    card = FOLDER / CARD_NAME  # transformers does not know the name "bundled"
    text = card.read_text(encoding="utf-8").replace("import hbll_seq.integrations.transformers\n", AUTO_IMPORT)
    for name in ("AutoTokenizer", "AutoModelForCausalLM"):
        text = text.replace(f'{name}.from_pretrained("bundled"', f"{name}.from_pretrained(BUNDLED")
    card.write_text(text, encoding="utf-8")
    EXPECTED.write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    print(f"\n{FOLDER.relative_to(ROOT)}: {sum(f.stat().st_size for f in FOLDER.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
