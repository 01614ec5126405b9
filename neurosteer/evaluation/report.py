"""Evaluations as files: the receipt, the texts as a table, and the dose against effect and damage as a picture."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from neurosteer.artifacts.files import csv_text, write_files
from neurosteer.artifacts.plots import receipt_plot
from neurosteer.evaluation.evaluate import EvaluatedText, Evaluation
from neurosteer.evaluation.receipts import receipt_text

RECEIPT_FILE, GENERATIONS_FILE = "receipt.json", "generations.csv"
PAGE_FILE, PLOT_FILE = "evaluation.html", "evaluation.png"

_COLUMNS = tuple(entry.name for entry in fields(EvaluatedText) if entry.name != "ids")
_SAMPLES = 3


def write_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Path, ...]:
    """Write the receipt, the texts, the page (which needs no network) and the picture; returns their paths.

    Raises `UsageError` where the folder cannot be written.
    """
    picture = receipt_plot(evaluation.receipt.data) or b""
    contents = {
        RECEIPT_FILE: receipt_text(evaluation.receipt),
        GENERATIONS_FILE: generations_csv(evaluation.rows),
        PAGE_FILE: evaluation_page(evaluation, picture),
        PLOT_FILE: picture,
    }
    return write_files(folder, contents)


def generations_csv(rows: Sequence[EvaluatedText]) -> str:
    """The texts with their scores, a row each."""
    columns = (*_COLUMNS, "tokens")
    return csv_text(columns, ({name: getattr(row, name) for name in columns} for row in rows))


def evaluation_page(evaluation: Evaluation, picture: bytes) -> str:
    """The picture (a PNG), the receipt's table and a few texts by strength, as one HTML page."""
    data = evaluation.receipt.data
    image = base64.b64encode(picture).decode()
    name = " + ".join(str(use["name"]) for use in data["recipe"])
    notes = "".join(f"<li>{escape(note)}</li>" for note in data["table"]["notes"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title><style>{_STYLE}'
        f"</style></head><body><h1>{escape(name)} on {escape(data['model']['name'])}</h1>"
        f'<img src="data:image/png;base64,{image}" alt="Effect, KL and perplexity by strength, and the controls">'
        f"<p>{escape(data['table']['title'])}</p>{table_html(data['table'])}<ul>{notes}</ul>"
        f"<h2>Texts</h2>{_texts_html(evaluation.rows)}</body></html>\n"
    )


def table_html(table: Mapping[str, Any]) -> str:
    """A receipt's table as HTML, everything in it escaped."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in table["columns"])
    rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in table["rows"])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _texts_html(rows: Sequence[EvaluatedText]) -> str:
    """The first prompts' texts, under the recipe and none, by strength."""
    shown = [row for row in rows if row.kind in ("steered", "unsteered") and row.sample == 0]
    prompts = list(dict.fromkeys(row.prompt for row in shown))[:_SAMPLES]
    parts = []
    for prompt in prompts:
        own = sorted((row for row in shown if row.prompt == prompt), key=lambda row: row.strength)
        lines = "".join(
            f"<tr><td>{row.strength:+g}</td><td>{row.score:.2f}</td><td>{escape(row.text)}</td></tr>" for row in own
        )
        heads = "<tr><th>Strength</th><th>Score</th><th>Text</th></tr>"
        parts.append(f"<h3>{escape(prompt)}</h3><table><thead>{heads}</thead><tbody>{lines}</tbody></table>")
    return "".join(parts)


_STYLE = (
    "img{max-width:100%}body{font-family:system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border:1px solid #ddd;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}"
)
