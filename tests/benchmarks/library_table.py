"""What the released library does at strength −1 and +1, from the receipts on its artifacts; Markdown.

    python tests/benchmarks/library_table.py [--vectors vectors]

The last two columns say, sign by sign, whether the effect is at least 20 points in the intended direction and its
difference from the random twins' clear of 0 (with how many of their standard deviations lie between; older receipts,
whose twins had the same dose instead of the same KL, do not tell), and whether wrong-way prompts are at most
15%, perplexity at most 1.5 × and 4-gram quality at least .95.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.storage import load

LEAST_EFFECT, MOST_WRONG_WAY, MOST_PERPLEXITY, LEAST_QUALITY = 0.20, 0.15, 1.5, 0.95
COLUMNS = (
    "artifact",
    "method",
    "judge right",
    "% at −1 / 0 / +1",
    "random at −1 / +1",
    "in words at −1 / +1",
    "wrong way",
    "perplexity ×",
    "4-gram quality",
    "effect clear of random at −1 / +1",
    "all bounds met",
)


def rows_by(receipt: Mapping[str, Any]) -> dict[tuple[str, float], Mapping[str, Any]]:
    """Rows by kind and strength."""
    return {(row["kind"], row["strength"]): row for row in receipt["rows"]}


def verdict(receipt: Mapping[str, Any], row: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Whether the effect is large enough and clear of the random twins'."""
    sign = row["strength"]
    moved = sign * (row["share"] - plain["share"]) >= LEAST_EFFECT
    for one in receipt.get("differences", ()):
        if (one["from"], one["strength"]) == ("random", sign):
            z = "" if one["z"] is None else f" ({one['z']:.1f})"
            return f"{'yes' if moved and one['is_clear'] else 'no'}{z}"
    return "–" if moved else "no"


def line(artifact: Artifact) -> str:
    receipt = artifact.receipts[-1].data
    rows = rows_by(receipt)
    plain = rows["unsteered", 0.0]
    both = [rows["steered", sign] for sign in (-1.0, 1.0)]
    random = [rows["random", sign] for sign in (-1.0, 1.0)]
    words = [rows["instruction", sign] for sign in (-1.0, 1.0)]
    shares = [both[0], plain, both[1]]
    effects = [verdict(receipt, row, plain) for row in both]
    bounds = [
        row["wrong_way"] <= MOST_WRONG_WAY and row["perplexity"] <= MOST_PERPLEXITY and row["quality"] >= LEAST_QUALITY
        for row in both
    ]
    met = ["yes" if one else "no" for one in bounds]

    def percent(some: list[Mapping[str, Any]], key: str = "share") -> str:
        return " / ".join(f"{100 * row[key]:.0f}" for row in some)

    def number(key: str) -> str:
        return " / ".join(f"{row[key]:.2f}" for row in both)

    said = [" / ".join(some) for some in (effects, met)]
    cells = (
        artifact.name, artifact.method, f"{100 * receipt['judge']['accuracy']:.0f}%", percent(shares), percent(random),
        percent(words), percent(both, "wrong_way"), number("perplexity"), number("quality"), *said,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def print_table(vectors: Path) -> None:
    """The artifacts in a folder that have a receipt."""
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for config in sorted(vectors.glob("*/config.json")):
        artifact = load(config.parent)
        if artifact.receipts:
            print(line(artifact))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=Path, default=Path(__file__).parent.parent.parent / "vectors")
    print_table(parser.parse_args().vectors)


if __name__ == "__main__":
    main()
