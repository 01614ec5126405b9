"""What happens on the Evaluate tab."""

import shutil
import tempfile
import threading
import time
import zipfile
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import Cancelled, NeuroSteerError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.ui.evaluating import KIND, Plan, built_from_all, made, options_of, seen, sets_about
from neurosteer.ui.jobs import problem, told
from neurosteer.ui.limits import strangers
from neurosteer.ui.mixer import Mix
from neurosteer.ui.shelf import put, zip_file
from neurosteer.ui.show import evaluation as show_evaluation
from neurosteer.ui.show import html as render
from neurosteer.ui.source import Source, read_bundled, read_file, read_source
from neurosteer.ui.tabs.startable import Startable, ended
from neurosteer.ui.wiring import Updates
from neurosteer.ui.work import at_most, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.provenance import Receipt
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.evaluation import Evaluation, Judge

RECIPE = ""  # what the Steer tab is set to, instead of a label of the shelf
BUNDLED, OWN, FILE, REFUSAL, WORDS, PATTERN = "bundled", "own", "file", "refusal", "words", "pattern"

_CANCELLED = "Cancelled. Whole batches of texts are kept: Run goes on with them if nothing is changed."
_REMEDY = "press Run again to go on with the texts that are there, or ask for fewer"
_OTHER = render.note_line(
    "It judges what that set is about: for anything else, upload labelled texts, or look for words."
)


class JudgeAsked(NamedTuple):
    """Who is to judge."""

    kind: str
    bundled: str | None = None
    file: str | None = None
    words: str = ""
    pattern: str = ""


class Measured(NamedTuple):
    """What was measured last: a receipt, and the artifact of the shelf it is of."""

    label: str
    artifact: "Artifact"
    receipt: "Receipt"


class EvaluateHandlers(Startable):
    """What happens on the Evaluate tab."""

    kind = KIND

    # --- choosing ---

    def choices(self, what: str | None, bundled: str | None, mix: Mix) -> Updates:
        """What there is to evaluate, and the set that fits it."""
        said = f"The Steer tab’s recipe: {mix.in_words()}" if mix.chosen else "The Steer tab’s recipe (nothing yet)"
        labels = list(mix.shelf)
        kept = what if what in (RECIPE, *labels) else None
        # One click on Run then gives figures that mean something.
        judged = [label for label in labels if sets_about([mix.shelf[label]])]
        chosen = kept if kept is not None else next(iter([*mix.chosen, *judged, *labels]), RECIPE)
        update = gr.update(choices=[*((label, label) for label in labels), (said, RECIPE)], value=chosen)
        return {"what": update, **({"bundled": self.fitting(chosen, bundled, mix)} if chosen != what else {})}

    def fitting(self, what: str | None, bundled: str | None, mix: Mix) -> Any:
        """The ready-made set that is about what `what` turns: the one it was built from, or named like it."""
        artifacts = [mix.shelf[label] for label in ([what] if what and what in mix.shelf else mix.chosen)]
        return next(iter(sets_about(artifacts)), bundled)

    def show_judge(self, kind: str) -> Updates:
        """Which group of inputs is visible."""
        return {own: gr.update(visible=kind == own) for own in (BUNDLED, FILE, WORDS, PATTERN)}

    def about_judge(self, request: gr.Request, what: str | None, asked: JudgeAsked, source: Source, mix: Mix) -> str:
        """What the judge will be made of, or why it cannot be."""
        self.jobs.remove_uploads_later(request.session_hash, asked.file)
        self.models.holder().wait_for_libraries()
        try:
            recipe = _recipe(what, mix)
            examples = _labelled(asked, source)
        except NeuroSteerError as error:
            return render.hint(str(error))
        except Exception as error:
            return render.error_line(problem(error))
        if examples is None:
            return ""
        if name := built_from_all(recipe, examples):
            return f"<p class='ns-warning'>{escape(seen(name, examples.name))}</p>"
        held_out = any(use.artifact.provenance.examples_sha256 == examples.sha256 for use in recipe.uses)
        part = "the texts that building left out" if held_out else "all texts"
        said = f"It is trained on {part} of {examples.name[:60]}, and says itself how often it is right."
        is_other = asked.kind == BUNDLED and examples.name not in sets_about([use.artifact for use in recipe.uses])
        return render.note_line(said) + (_OTHER if is_other else "")

    def judge(self, asked: JudgeAsked, source: Source, recipe: "Recipe", cancel: threading.Event) -> "Judge":
        """The judge asked for. Raises the library's errors."""
        from neurosteer.evaluation import JudgeRequest

        named = {REFUSAL: "refusal", WORDS: f"words:{asked.words}"}
        if not strangers():
            named[PATTERN] = f"regex:{asked.pattern}"
        if asked.kind == WORDS and not asked.words.strip(" ,"):
            raise UsageError("There are no words to look for; write some, with commas between them.")
        examples = _labelled(asked, source)
        if examples is None and asked.kind not in named:
            raise UsageError("Choose a judge first.")
        words = "" if examples is not None else named[asked.kind]
        return made(JudgeRequest(words, examples), recipe, cancel)

    # --- measuring ---

    def evaluate(
        self, request: gr.Request, progress: gr.Progress, what: str | None, asked: JudgeAsked, plan: Plan,
        source: Source, mix: Mix,
    ) -> Updates:  # fmt: skip
        """Measure, and show and offer what was found. Whatever goes wrong becomes one line; inputs, and what was shown
        before, stay."""
        visitor, report = request.session_hash, in_words(progress)
        cancel = self.jobs.current(visitor, KIND)
        try:
            session = self.models.holder(mix.model).wait(report, cancel)
            recipe, options = _recipe(what, mix), options_of(plan)
            folder, started = self.jobs.folder(visitor), time.monotonic()
            from neurosteer.evaluation import evaluate

            with at_most(cancel, _REMEDY):
                report("Training the judge")
                judge = self.judge(asked, source, recipe, cancel)
                found = session.run(evaluate, recipe, judge, **options, out=folder, progress=report, cancel=cancel)
            seconds = time.monotonic() - started
            progress(0.99, desc="Drawing")
            return {**ended(), **_shown(found, seconds), **_offered(found, folder, _measured(what, mix, found))}
        except Cancelled:
            return ended(note=render.note_line(_CANCELLED))
        except Exception as error:
            return ended(error=render.error_line(problem(error)))

    @told("error", note="")
    def attach(self, request: gr.Request, measured: Measured | None, mix: Mix) -> Updates:
        """Put the receipt on the artifact of the shelf."""
        if measured is None:
            return {}
        from neurosteer.evaluation import with_receipt

        hidden = gr.update(visible=False)
        now = mix.shelf.get(measured.label)
        if now is None or not _is_same(now, measured.artifact):
            gone = f"{measured.label} on the shelf is no longer what was measured; run the evaluation again."
            return {"error": render.error_line(gone), "note": "", "attach": hidden}
        kept = with_receipt(now, measured.receipt)
        shelf, label = put(mix.shelf, kept, measured.label)
        self.jobs.remove_later(request.session_hash, zip_file(kept))
        said = render.note_line(f"{label} carries the receipt now: downloads and its card on the Hub show it.")
        return {"error": "", "note": said, "attach": hidden, **mix.choosing(shelf, mix.chosen).updates()}


def _labelled(asked: JudgeAsked, source: Source) -> ContrastSet | None:
    """The texts that a classifier is to be trained on; None for the other judges. Raises `UsageError` where there are
    none yet."""
    if asked.kind == BUNDLED:
        if not asked.bundled:
            raise UsageError("Choose the set that the judge is trained on.")
        return read_bundled(asked.bundled)
    if asked.kind == OWN:
        examples = read_source(source)
        if examples is None:
            raise UsageError("There are no examples on the Build tab; choose some there, or another judge.")
        return examples
    if asked.kind == FILE:
        if not asked.file:
            raise UsageError("Upload labelled texts for the judge first.")
        return read_file(asked.file)
    return None


def _recipe(what: str | None, mix: Mix) -> "Recipe":
    from neurosteer.artifacts.recipes import Recipe

    if what == RECIPE:
        if not mix.chosen:
            raise UsageError("Nothing is chosen on the Steer tab; choose something there, or an artifact here.")
        return mix.recipe()
    if what is None or what not in mix.shelf:
        raise UsageError("Choose what to evaluate first; what you build or pull appears in the list.")
    return Recipe.of(mix.shelf[what])


def _measured(what: str | None, mix: Mix, found: "Evaluation") -> Measured | None:
    """What can be put on an artifact: a receipt of it alone, at strength 1."""
    label = mix.chosen[0] if what == RECIPE else str(what)
    return None if found.artifact is None else Measured(label, mix.shelf[label], found.receipt)


def _is_same(one: "Artifact", other: "Artifact") -> bool:
    """Whether both steer alike; their receipts may differ."""
    made = [(artifact.name, artifact.method, artifact.provenance, artifact.calibration) for artifact in (one, other)]
    return made[0] == made[1]


def _shown(found: "Evaluation", seconds: float) -> Updates:
    receipt = found.receipt
    return {
        "summary": show_evaluation.summary(receipt, len(found.rows), seconds),
        "effect": gr.update(value=show_evaluation.effect_figure(receipt), visible=True),
        "damage": gr.update(value=show_evaluation.damage_figure(receipt), visible=True),
        "table": show_evaluation.table(receipt),
        "texts": show_evaluation.texts(found.rows),
    }


def _offered(found: "Evaluation", folder: Path, measured: Measured | None) -> Updates:
    label = f"Keep on {measured.label}" if measured else "Keep"
    return {
        "download": gr.update(value=evaluation_zip(found, folder), visible=True),
        "attach": gr.update(value=label, visible=measured is not None),
        "measured": measured,
    }


def evaluation_zip(found: "Evaluation", folder: Path) -> str:
    """The path of a zip file in `folder` with all that `write_evaluation` writes; earlier ones there go."""
    from neurosteer.evaluation import write_evaluation

    for earlier in folder.glob("zip-*"):
        shutil.rmtree(earlier, ignore_errors=True)
    target = Path(tempfile.mkdtemp(dir=folder, prefix="zip-"))  # browsers keep what they fetched from a place
    name = "-".join(str(use["name"]) for use in found.receipt.data["recipe"])[:80]
    with tempfile.TemporaryDirectory(dir=folder) as written:
        path = target / f"{name}-evaluation.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for one in write_evaluation(found, Path(written)):
                file.write(one, one.name)
    return str(path)
