"""What steering does to Qwen2.5-Coder-1.5B-Instruct (`packaged.py`): artifacts with receipts, as Markdown.

    python tests/benchmarks/qwen_table.py DATA [--only sentiment,refusal-circuit] [--out build/qwen] [--samples 6]
    python tests/benchmarks/qwen_table.py DATA --table  # of the receipts that lie in the folder

Sentiment and politeness are built from `train.csv` of DATA's folders and judged by `judge.csv`, formality from one half
of the bundled set and judged by the other; calibrated to 1 nat, layers chosen automatically. Refusal is the model's
own: built from prompts alone, read at their last token, and measured on every fourth goal of JailbreakBench and
ordinary request, of which no answer is kept. Every receipt has ten random twins at equal KL, one twin from shuffled
labels and the instruction in plain words; 16 neutral prompts × `--samples` texts of 30 tokens. Columns as in
`library_table.py`.
"""

import argparse
from pathlib import Path

from library import CAA, CNA, VECTORS, Item, release
from library_table import print_table
from packaged import QWEN

REFUSAL = {"framing": "prompt", "tokens": "last"}
ITEMS = (
    *(Item(name, name, VECTORS[name], (CAA,)) for name in ("sentiment", "politeness", "formality")),
    *(Item(f"{name}-circuit", name, VECTORS[name], (CNA,)) for name in ("sentiment", "politeness", "formality")),
    Item("refusal", "refusal", "Refuses (+) or answers (−). For research on refusal.", (CAA | REFUSAL,)),
    Item("refusal-circuit", "refusal", "Refuses (+) or answers (−). For research on refusal.", (CNA | REFUSAL,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/qwen"))
    parser.add_argument("--only", default=",".join(item.name for item in ITEMS))
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    items = [] if arguments.table else [item for item in ITEMS if item.name in arguments.only.split(",")]
    lm = QWEN.load() if items else None
    for item in items:
        assert lm is not None
        release(lm, item, arguments.data, arguments.out, arguments.samples, again=False)
    print_table(arguments.out)


if __name__ == "__main__":
    main()
