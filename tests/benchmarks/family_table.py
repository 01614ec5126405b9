"""What works on which family of models, as Markdown, from a tiny random model of each.

    python tests/benchmarks/family_table.py

"load": its parts are found. "vector": one is built. "exact": in float32, texts steered in one padded batch with a
cache, without one, and by naive code (a row at a time, hooks of its own) are the same. "circuit": one is built and
steers as exactly. "relp": next words can be attributed, and an MLP's inputs add up to what it gives. "token KL": as
naive code's. Of what is refused the reason stands there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from families import FAMILIES
from family_check import OK, FamilyRow, check_family

REASONS = {
    "mixture of experts": "experts",
    "told apart by token": "no MLP",
    "no rule is known": "no rule for its MLP",
    "unknown kind": "no rule for its norms",
    "several streams": "several streams",
    "padding": "reads padding",
}


def cell(value: str) -> str:
    if value in (OK, ""):
        return value or "–"
    return next((short for long, short in REASONS.items() if long in value), value)


def line(row: FamilyRow) -> str:
    values = (row.load, row.vector, row.exact, row.circuit, row.relp, row.token_kl)
    return f"| {row.family} | {' | '.join(map(cell, values))} |"


def main() -> None:
    torch.set_num_threads(1)
    print("| family | load | vector | exact | circuit | relp | token KL |\n|---|---|---|---|---|---|---|")
    rows = [check_family(family) for family in FAMILIES]
    for row in rows:
        print(line(row))
    exact = sum(row.exact == OK for row in rows)
    print(f"\n{sum(row.load == OK for row in rows)} of {len(rows)} load, {exact} are steered exactly.")


if __name__ == "__main__":
    main()
