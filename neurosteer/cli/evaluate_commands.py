"""The verb that measures what artifacts do and break, and what `sweep` shares with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer import processes
from neurosteer.cli import options as opt
from neurosteer.cli.inputs import everywhere, named_by, numbers, read_prompts, recipe_of
from neurosteer.cli.output import err, new_table, out, print_json, print_table, progress_line
from neurosteer.cli.places import files_place, folder_of
from neurosteer.errors import UsageError

if TYPE_CHECKING:
    from neurosteer.evaluation import Evaluation, JudgeRequest

_TABLE_WIDTH = 220
_RANDOM = 10


def evaluate(
    *,
    use: opt.UseOption,
    judging: opt.JudgeOptions,
    reading: opt.ColumnOptions,
    strengths: opt.StrengthsOption = "-2,-1,0,1,2",
    prompts: opt.PromptsOption = None,
    samples: opt.SamplesOption = 1,
    max_new_tokens: opt.MaxNewTokensOption = 40,
    instructions: Annotated[
        tuple[str, str] | None, typer.Option(metavar="UP DOWN", help="What asks in plain words for +1 and for −1.")
    ] = None,
    random: opt.RandomOption = _RANDOM,
    folder: Annotated[Path | None, opt.out_option("the receipt, texts and plots; run again, it goes on")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the receipt on the artifact, in its local folder.")
    ] = False,
    seed: opt.SeedOption = 0,
    model: opt.ModelOptions,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure effect and damage at several strengths, beside no steering, random twins and plain words."""
    from neurosteer.evaluation import evaluate as measure
    from neurosteer.examples.files import sweep_prompts

    place, kept = files_place(folder), _folder_to_save(use) if save else None
    values = numbers(strengths, "--strengths")
    asked = judge_request(judging, reading)
    named = everywhere(named_by(use))
    texts = read_prompts(prompts) if prompts else sweep_prompts()
    with progress_line(logged=True) as progress:
        lm = model.load(progress, named.model)
        recipe = recipe_of(named, lm, progress)[0]
        found = measure(
            lm, recipe, asked.judge(recipe), prompts=texts, strengths=values, samples=samples,
            max_new_tokens=max_new_tokens, instructions=instructions, n_random=_RANDOM if random is None else random,
            seed=seed, out=place, examples=asked.training, progress=progress,
        )  # fmt: skip
    report(found, place, kept, as_json)


def judge_request(judging: opt.JudgeOptions, reading: opt.ColumnOptions) -> "JudgeRequest":
    """What --judge and --examples ask for; mistakes in them show before a model is loaded."""
    from neurosteer.evaluation import JudgeRequest

    if judging.examples is None and reading != opt.ColumnOptions():
        raise UsageError("What columns hold is said without --examples; name the file they are in.")
    labelled = reading.read(judging.examples) if judging.examples is not None else None
    return JudgeRequest(judging.judge or "", labelled, "--examples")


def report(found: "Evaluation", folder: Path | None, save_to: Path | None, as_json: bool) -> None:
    """Write the files, keep the receipt on the artifact, and print the table or the receipt; one of several processes
    does."""
    if processes.rank() > 0:
        return
    from neurosteer.artifacts.storage import save
    from neurosteer.evaluation import write_evaluation

    files = write_evaluation(found, folder) if folder is not None else ()
    if save_to is not None:
        if found.artifact is None:
            raise UsageError(
                "--save needs one artifact at strength 1; what was measured is in --out, if that was given."
            )
        save(found.artifact, save_to)
    if as_json:
        written: dict[str, Any] = {"files": [str(file) for file in files]}
        print_json({"receipt": dict(found.receipt.data), **written, "saved": str(save_to) if save_to else None})
        return
    _print_receipt_table(found.receipt.data["table"])
    if files:
        err.print(f"Wrote {', '.join(file.name for file in files)} to {folder}.")
    if save_to is not None:
        err.print(f"Kept the receipt on {save_to}.")


def _print_receipt_table(table: dict[str, Any]) -> None:
    out.print(table["title"] + "\n")
    shown = new_table(table["columns"], right=table["columns"][1:])
    for row in table["rows"]:
        shown.add_row(*row)
    print_table(shown, width=_TABLE_WIDTH)
    for note in table.get("notes", []):
        out.print(f"\n{note}")


def _folder_to_save(use: Sequence[str]) -> Path:
    """The local folder of the one artifact used, before anything is loaded. Raises `UsageError` where there is none
    that may be changed."""
    if len(use) != 1:
        raise UsageError(f"--save keeps a receipt on one artifact; --use names {len(use)}.")
    reference, colon, strength = use[0].rpartition(":")
    at_one = colon and strength in ("1", "1.0", "+1")
    folder = folder_of(use[0]) or (folder_of(reference) if at_one else None)
    if folder is None:
        raise UsageError(f"--save needs an artifact in a local folder, at strength 1; {use[0][:200]!r} is none.")
    return folder
