"""The Evaluate tab: what an artifact or recipe does and breaks, by strength, beside its controls."""

import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from neurosteer.errors import Cancelled, NeuroSteerError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets, neutral_prompts
from neurosteer.examples.reading import parse_examples, read_examples
from neurosteer.ui.jobs import BUSY, Jobs, problem
from neurosteer.ui.limits import (
    MAX_EVALUATED_PROMPTS,
    MAX_EVALUATED_SAMPLES,
    MAX_EVALUATED_STRENGTHS,
    MAX_EVALUATED_TEXTS,
    MAX_EVALUATED_TOKENS,
    MAX_EVALUATIONS,
    MAX_JUDGE_CHARACTERS,
    MAX_PROMPT,
    MAX_SECONDS,
    strangers,
)
from neurosteer.ui.loading import Models
from neurosteer.ui.mixer import Mix, Mixer, unchanged
from neurosteer.ui.shelf import zip_file
from neurosteer.ui.show import evaluation as shown
from neurosteer.ui.show import html as render
from neurosteer.ui.source import Source, read_source
from neurosteer.ui.work import PROGRESS, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.provenance import Receipt
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.evaluation import Evaluation, Judge, JudgeRequest

KIND = "evaluate"
RECIPE = ""  # what the Steer tab is set to, instead of a label of the shelf
BUNDLED, OWN, FILE, REFUSAL, WORDS, PATTERN = "bundled", "own", "file", "refusal", "words", "pattern"
N_PROMPTS, N_TOKENS, STRENGTHS = 8, 30, "-2, -1, 0, 1, 2"
MOST_RANDOM = 10

_JUDGES = [
    ("A classifier, trained on a ready-made set", BUNDLED),
    ("… on the examples of the Build tab", OWN),
    ("… on labelled texts of mine", FILE),
    ("A detector of refusals", REFUSAL),
    ("Words to look for", WORDS),
]
_PATTERNS = ("A pattern (regular expression)", PATTERN)  # some keep a processor busy for hours: not for strangers
_HELP = (
    "The model writes the same prompts at every strength, and beside that with no steering, with random twins at the "
    "same KL and with a plain instruction. A judge says which texts show the behaviour; damage needs no judge."
)
_LABELLED = "Texts with labels, as for building: not those the artifact was built from"
_CANCELLED = "Cancelled. Whole batches of texts are kept: Run goes on with them if nothing is changed."
_OVER = (
    f"This took over {MAX_SECONDS:g} s and was stopped. Press Run again to go on with the texts that are there, or ask "
    "for fewer."
)


_OTHER = render.note_line(
    "It judges what that set is about: for anything else, upload labelled texts, or look for words."
)


class JudgeAsked(NamedTuple):
    """Who is to judge: the values of the components, in their order."""

    kind: str
    bundled: str | None
    file: str | None
    words: str
    pattern: str


class Plan(NamedTuple):
    """What to write: the values of the components, in their order."""

    prompts: str
    n_prompts: float
    strengths: str
    samples: float
    tokens: float
    n_random: float
    more: str
    less: str
    seed: float


class Measured(NamedTuple):
    """What was measured last: a receipt, and the artifact of the shelf it is of."""

    label: str
    artifact: "Artifact"
    receipt: "Receipt"


# --- what is asked for -----------------------------------------------------------------------------------------------


def options_of(plan: Plan) -> dict[str, Any]:
    """The arguments of `evaluate`. Raises `UsageError` for what is more than the page takes."""
    lines = list(dict.fromkeys(line.strip() for line in plan.prompts.splitlines() if line.strip()))
    instructions = (plan.more.strip(), plan.less.strip())
    if any(instructions) and not all(instructions):
        raise UsageError("One of the two instructions is empty; write both, or neither.")
    options = {
        "prompts": tuple(lines) if lines else neutral(int(plan.n_prompts)),
        "strengths": strengths_of(plan.strengths),
        "samples": int(plan.samples),
        "max_new_tokens": int(plan.tokens),
        "n_random": int(plan.n_random),
        "instructions": instructions if all(instructions) else None,
        "seed": int(plan.seed or 0),
    }
    check_size(options)
    return options


def strengths_of(text: str) -> tuple[float, ...]:
    """Numbers parted by commas. Raises `UsageError`."""
    try:
        return tuple(float(part.replace("−", "-")) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"The strengths are {text[:60]!r}; give numbers parted by commas, like -1, 0, 1.") from error


def neutral(count: int) -> tuple[str, ...]:
    """So many of the bundled prompts, half of them instructions, half openings."""
    prompts = neutral_prompts()
    half = len(prompts) // 2
    return prompts[: count - count // 2] + prompts[half : half + count // 2]


def check_size(options: dict[str, Any]) -> None:
    """Raise `UsageError` for an evaluation that is larger than the page takes."""
    from neurosteer.evaluation.controls import n_groups

    prompts = options["prompts"]
    for what, count, most in (
        ("prompts", len(prompts), MAX_EVALUATED_PROMPTS),
        ("strengths", len(options["strengths"]), MAX_EVALUATED_STRENGTHS),
        ("samples", options["samples"], MAX_EVALUATED_SAMPLES),
        ("tokens a text", options["max_new_tokens"], MAX_EVALUATED_TOKENS),
        ("random twins", options["n_random"], MOST_RANDOM),
    ):
        if not 1 <= count <= most:
            raise UsageError(f"{count:,} {what} are asked for; give 1 to {most}.")
    longest = max(map(len, prompts))
    if longest > MAX_PROMPT:
        raise UsageError(f"A prompt has {longest:,} characters; this page takes {MAX_PROMPT:,}.")
    texts = n_groups(options["strengths"]) * len(prompts) * options["samples"]
    if texts > MAX_EVALUATED_TEXTS:
        raise UsageError(
            f"That is {texts:,} texts with the controls; this page writes {MAX_EVALUATED_TEXTS}. Give fewer prompts, "
            "strengths or samples."
        )


def made(asked: "JudgeRequest", recipe: "Recipe", cancel: threading.Event) -> "Judge":
    """The judge asked for. Raises the library's errors, and `UsageError` for more texts than the page takes."""
    examples = asked.training
    if examples is not None:
        characters = sum(map(len, (*examples.positive, *examples.negative)))
        if characters > MAX_JUDGE_CHARACTERS:
            raise UsageError(
                f"The labelled texts have {characters:,} characters; this page takes {MAX_JUDGE_CHARACTERS:,} for a "
                "judge."
            )
        if name := built_from_all(recipe, examples):
            raise UsageError(_seen(name, examples.name))
    return asked.judge(recipe, cancel)


def built_from_all(recipe: "Recipe", examples: ContrastSet) -> str | None:
    """The name of an artifact that no text of `examples` was held out of."""
    uses = [use.artifact for use in recipe.uses if use.artifact.provenance.examples_sha256 == examples.sha256]
    return next((artifact.name for artifact in uses if artifact.provenance.hold_out <= 0), None)


def _seen(name: str, examples: str) -> str:
    return (
        f"{name!r} was built from all texts of {examples[:60]!r}, so they cannot judge it: use other labelled texts, "
        "or build it anew with half of them kept for judging (Build, Advanced; keep_half for programs)."
    )


def file_examples(path: str) -> ContrastSet:
    """The labelled texts of an upload. Raises `ExamplesError`."""
    return parse_examples(Path(path).read_bytes(), filename=Path(path).name)


class EvaluateHandlers:
    """What happens on the Evaluate tab."""

    def __init__(self, models: Models, jobs: Jobs) -> None:
        self.models = models
        self.jobs = jobs

    # --- choosing ---

    def choices(self, what: str | None, bundled: str | None, *values: Any) -> list[Any]:
        """What there is to evaluate, and the set that fits it: `[what, bundled]`."""
        mix = Mix.of(values)
        said = f"The Steer tab’s recipe: {mix.in_words()}" if mix.chosen else "The Steer tab’s recipe (nothing yet)"
        labels = list(mix.shelf)
        kept = what if what in (RECIPE, *labels) else None
        # One click on Run then gives figures that mean something.
        judged = [label for label in labels if _sets_about([mix.shelf[label]])]
        chosen = kept if kept is not None else next(iter([*mix.chosen, *judged, *labels]), RECIPE)
        update = gr.update(choices=[*((label, label) for label in labels), (said, RECIPE)], value=chosen)
        return [update, self.fitting(chosen, bundled, *values) if chosen != what else gr.skip()]

    def fitting(self, what: str | None, bundled: str | None, *values: Any) -> Any:
        """The ready-made set that is about what `what` turns: the one it was built from, or named like it."""
        mix = Mix.of(values)
        artifacts = [mix.shelf[label] for label in ([what] if what and what in mix.shelf else mix.chosen)]
        return next(iter(_sets_about(artifacts)), bundled)

    def show_judge(self, kind: str) -> list[Any]:
        """Which group of inputs is visible, of bundled, file, words and pattern."""
        return [gr.update(visible=kind == own) for own in (BUNDLED, FILE, WORDS, PATTERN)]

    def about_judge(self, request: gr.Request, what: str | None, *values: Any) -> str:
        """What the judge will be made of, or why it cannot be."""
        asked, source, mix = _parted(values, JudgeAsked, Source)
        self.jobs.keep(request.session_hash, asked.file)
        self.models.holder().wait_for_libraries()
        try:
            recipe = _recipe(what, mix)
            examples = self._labelled(asked, source)
        except NeuroSteerError as error:
            return render.hint(str(error))
        except Exception as error:
            return render.error_line(problem(error))
        if examples is None:
            return ""
        if name := built_from_all(recipe, examples):
            return f"<p class='ns-warning'>{escape(_seen(name, examples.name))}</p>"
        seen = any(use.artifact.provenance.examples_sha256 == examples.sha256 for use in recipe.uses)
        part = "the texts that building left out" if seen else "all texts"
        said = f"It is trained on {part} of {examples.name[:60]}, and says itself how often it is right."
        is_other = asked.kind == BUNDLED and examples.name not in _sets_about([use.artifact for use in recipe.uses])
        return render.note_line(said) + (_OTHER if is_other else "")

    def _labelled(self, asked: JudgeAsked, source: Source) -> ContrastSet | None:
        """The texts that a classifier is to be trained on; None for the other judges. Raises `UsageError` where there
        are none yet."""
        if asked.kind == BUNDLED:
            if not asked.bundled:
                raise UsageError("Choose the set that the judge is trained on.")
            return read_examples(asked.bundled)
        if asked.kind == OWN:
            examples = read_source(source)
            if examples is None:
                raise UsageError("There are no examples on the Build tab; choose some there, or another judge.")
            return examples
        if asked.kind == FILE:
            if not asked.file:
                raise UsageError("Upload labelled texts for the judge first.")
            return file_examples(asked.file)
        return None

    def judge(self, asked: JudgeAsked, source: Source, recipe: "Recipe", cancel: threading.Event) -> "Judge":
        """The judge asked for. Raises the library's errors."""
        from neurosteer.evaluation import JudgeRequest

        named = {REFUSAL: "refusal", WORDS: f"words:{asked.words}"}
        if not strangers():
            named[PATTERN] = f"regex:{asked.pattern}"
        if asked.kind == WORDS and not asked.words.strip(" ,"):
            raise UsageError("There are no words to look for; write some, with commas between them.")
        examples = self._labelled(asked, source)
        if examples is None and asked.kind not in named:
            raise UsageError("Choose a judge first.")
        words = "" if examples is not None else named[asked.kind]
        return made(JudgeRequest(words, examples), recipe, cancel)

    # --- measuring ---

    def begin(self, request: gr.Request) -> list[Any]:
        """At once, before the work has its turn: Cancel works from here on."""
        self.jobs.begin(request.session_hash, KIND)
        return [gr.update(interactive=False), gr.update(interactive=True), "", ""]

    def give_up(self) -> list[Any]:
        """When the server could not even begin: the buttons as they were."""
        return [gr.update(interactive=True), gr.update(interactive=False), render.error_line(BUSY), ""]

    def cancel(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, KIND)

    def evaluate(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        """`[*buttons, error, note, summary, effect, damage, table, texts, download, keep, measured]`. Whatever goes
        wrong becomes one line; inputs, and what was shown before, stay."""
        what, (asked, plan, source, mix) = values[0], _parted(values[1:], JudgeAsked, Plan, Source)
        buttons = [gr.update(interactive=True), gr.update(interactive=False)]
        visitor, started = request.session_hash, time.monotonic()
        cancel = self.jobs.current(visitor, KIND)
        try:
            session = self.models.holder(mix.model).wait(in_words(progress), cancel)
            recipe, options = _recipe(what, mix), options_of(plan)
            progress(0.0, desc="Training the judge")
            judge, folder = self.judge(asked, source, recipe, cancel), self.jobs.folder(visitor)
            from neurosteer.evaluation import evaluate

            started = time.monotonic()
            with _at_most(MAX_SECONDS, cancel):
                found = session.run(
                    evaluate, recipe, judge, **options, out=folder, progress=in_words(progress), cancel=cancel
                )
            seconds = time.monotonic() - started
            progress(0.99, desc="Drawing")
            measured = _measured(what, mix, found)
            return [*buttons, "", "", *_shown(found, seconds), *_offered(found, folder, measured)]
        except Cancelled:
            over = time.monotonic() - started >= MAX_SECONDS
            said = [render.error_line(_OVER), ""] if over else ["", render.note_line(_CANCELLED)]
            return [*buttons, *said, *[gr.skip()] * 8]
        except Exception as error:
            return [*buttons, render.error_line(problem(error)), "", *[gr.skip()] * 8]

    def keep(self, request: gr.Request, measured: Measured | None, *values: Any) -> list[Any]:
        """Put the receipt on the artifact of the shelf: `[error, note, keep, *mixer]`."""
        mix = Mix.of(values)
        if measured is None:
            return [gr.skip()] * 3 + unchanged()
        from neurosteer.evaluation import with_receipt

        now = mix.shelf.get(measured.label)
        if now is None or not _is_same(now, measured.artifact):
            gone = f"{measured.label} on the shelf is no longer what was measured; run the evaluation again."
            return [render.error_line(gone), "", gr.update(visible=False), *unchanged()]
        kept = with_receipt(now, measured.receipt)
        self.jobs.keep(request.session_hash, zip_file(kept))
        said = render.note_line(f"{measured.label} carries the receipt now: downloads and its card on the Hub show it.")
        mixed = mix.choosing({**mix.shelf, measured.label: kept}, mix.chosen).updates()
        return ["", said, gr.update(visible=False), *mixed]


def _sets_about(artifacts: Sequence["Artifact"]) -> list[str]:
    """The ready-made sets that one of `artifacts` was built from, or is named like."""
    sources = {artifact.provenance.examples for artifact in artifacts}
    names = " ".join(artifact.name for artifact in artifacts)
    return [name for name in bundled_sets() if name in sources or name in names]


def _parted(values: Sequence[Any], *kinds: Any) -> list[Any]:
    """`values` as one of each of `kinds`, and a `Mix` of the rest."""
    parts, rest = [], list(values)
    for kind in kinds:
        count = len(kind._fields)
        parts.append(kind(*rest[:count]))
        rest = rest[count:]
    return [*parts, Mix.of(rest)]


def _recipe(what: str | None, mix: Mix) -> "Recipe":
    from neurosteer.artifacts.recipes import Recipe

    if what == RECIPE:
        if not mix.chosen:
            raise UsageError("Nothing is chosen on the Steer tab; choose something there, or an artifact here.")
        return mix.recipe()
    if what is None or what not in mix.shelf:
        raise UsageError("Choose what to evaluate first; what you build or pull appears in the list.")
    return Recipe.of(mix.shelf[what])


def _measured(what: str, mix: Mix, found: "Evaluation") -> Measured | None:
    """What can be kept on an artifact: a receipt of it alone, at strength 1."""
    label = mix.chosen[0] if what == RECIPE else what
    return None if found.artifact is None else Measured(label, mix.shelf[label], found.receipt)


def _is_same(one: "Artifact", other: "Artifact") -> bool:
    """Whether both steer alike; their receipts may differ."""
    made = [(artifact.name, artifact.method, artifact.provenance, artifact.calibration) for artifact in (one, other)]
    return made[0] == made[1]


@contextmanager
def _at_most(seconds: float, cancel: threading.Event) -> Iterator[None]:
    """Sets `cancel` after so many seconds."""
    timer = threading.Timer(seconds, cancel.set)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shown(found: "Evaluation", seconds: float) -> list[Any]:
    receipt = found.receipt
    return [
        shown.summary(receipt, len(found.rows), seconds),
        gr.update(value=shown.effect_figure(receipt), visible=True),
        gr.update(value=shown.damage_figure(receipt), visible=True),
        shown.table(receipt),
        shown.texts(found.rows),
    ]


def _offered(found: "Evaluation", folder: Path, measured: Measured | None) -> list[Any]:
    label = f"Keep on {measured.label}" if measured else "Keep"
    return [
        gr.update(value=evaluation_zip(found, folder), visible=True),
        gr.update(value=label, visible=measured is not None),
        measured,
    ]


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


# --- the layout ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateTab:
    """The components that handlers read and write."""

    what: gr.Dropdown
    judge: tuple[Any, ...]
    about_judge: gr.HTML
    plan: tuple[Any, ...]
    start: gr.Button
    cancel: gr.Button
    error: gr.HTML
    note: gr.HTML
    summary: gr.HTML
    effect: gr.Plot
    damage: gr.Plot
    table: gr.HTML
    texts: gr.HTML
    download: gr.DownloadButton
    keep: gr.Button
    measured: gr.State

    @property
    def outputs(self) -> list[Any]:
        """In the order of what `evaluate` returns."""
        before = [self.start, self.cancel, self.error, self.note, self.summary, self.effect, self.damage]
        return [*before, self.table, self.texts, self.download, self.keep, self.measured]


def lay_out() -> EvaluateTab:
    """The tab's components, within the current layout."""
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            gr.Markdown("### What does it do, and what does it break?")
            gr.HTML(render.hint(_HELP), elem_classes="ns-flush")
            what = gr.Dropdown([], label="What to evaluate", elem_id="evaluated")
            judge, about = _judge_inputs()
        with gr.Column(min_width=320):
            gr.Markdown("### What it writes for that")
            plan = _plan_inputs()
            with gr.Row():
                start = gr.Button("Run", variant="primary", min_width=90, elem_id="evaluate")
                cancel = gr.Button("Cancel", interactive=False, min_width=90, elem_id="cancel-evaluate")
            error = gr.HTML(elem_id="evaluate-error", elem_classes="ns-flush")
            note = gr.HTML(elem_id="evaluate-note", elem_classes="ns-flush")
            nothing = "What is found appears here: about a minute on a laptop’s processor."
            summary = gr.HTML(render.hint(nothing), elem_id="evaluation", elem_classes="ns-flush")
            with gr.Row():
                keep = gr.Button("Keep", variant="primary", visible=False, elem_id="keep-receipt")
                download = gr.DownloadButton("Download (.zip)", visible=False, elem_id="download-evaluation")
    with gr.Row(elem_classes="ns-columns"):
        with gr.Column(min_width=320):
            effect = gr.Plot(label="Effect by strength", show_label=False, visible=False, elem_id="effect")
        with gr.Column(min_width=320):
            damage = gr.Plot(label="Damage by strength", show_label=False, visible=False, elem_id="damage")
    table = gr.HTML(elem_id="figures", elem_classes="ns-flush")
    texts = gr.HTML(elem_id="written", elem_classes="ns-flush")
    return EvaluateTab(
        what, judge, about, plan, start, cancel, error, note, summary, effect, damage, table, texts, download, keep,
        gr.State(None),
    )  # fmt: skip


def _judge_inputs() -> tuple[tuple[Any, ...], gr.HTML]:
    offered = _JUDGES if strangers() else [*_JUDGES, _PATTERNS]
    kind = gr.Radio(offered, value=BUNDLED, label="Who judges", elem_classes="ns-stacked", elem_id="judge")
    names = list(bundled_sets())
    bundled = gr.Dropdown(names, value=names[0] if names else None, label="Ready-made set", elem_id="judge-set")
    file = gr.File(label=_LABELLED, height=140, visible=False, elem_id="judge-file")
    words = gr.Textbox(
        "", label="Words", info="A text with any of them shows it; commas between", max_lines=2, max_length=500,
        visible=False, elem_id="judge-words",
    )  # fmt: skip
    pattern = gr.Textbox("", label="Pattern", max_lines=1, max_length=500, visible=False, elem_id="judge-pattern")
    return (kind, bundled, file, words, pattern), gr.HTML(elem_id="about-judge", elem_classes="ns-flush")


def _plan_inputs() -> tuple[Any, ...]:
    prompts = gr.Textbox(
        "", label="Prompts, one a line", placeholder="empty: neutral ones that ask for nothing in particular", lines=3,
        max_lines=10, elem_id="evaluate-prompts",
    )  # fmt: skip
    with gr.Row():
        n_prompts = gr.Slider(
            2,
            MAX_EVALUATED_PROMPTS,
            value=N_PROMPTS,
            step=2,
            label="Neutral prompts",
            info="Where there are none above",
        )
        strengths = gr.Textbox(
            STRENGTHS, label="Strengths", info="1 is the artifact as it is", max_lines=1, max_length=100,
            elem_id="strengths",
        )  # fmt: skip
    with gr.Row():
        samples = gr.Slider(1, MAX_EVALUATED_SAMPLES, value=1, step=1, label="Samples", info="Texts a prompt")
        tokens = gr.Slider(
            8, MAX_EVALUATED_TOKENS, value=N_TOKENS, step=1, label="Length", info="At most this many tokens"
        )
    with gr.Accordion("Controls", open=False):
        n_random = gr.Slider(1, MOST_RANDOM, value=MOST_RANDOM, step=1, label="Random twins")
        with gr.Row():
            more = gr.Textbox("", label="Asking for it in plain words", placeholder="automatic", max_length=300)
            less = gr.Textbox("", label="… and for the opposite", placeholder="automatic", max_length=300)
        seed = gr.Number(0, label="Seed", info="The same seed, the same figures", precision=0)
    return prompts, n_prompts, strengths, samples, tokens, n_random, more, less, seed


def wire(tab: EvaluateTab, mixer: Mixer, source: Sequence[Any], entry: gr.Tab, handlers: EvaluateHandlers) -> None:
    """Connect the components with the handlers; `source` are the Build tab's components of examples."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    kind, bundled, file, words, pattern = tab.judge
    chosen = [tab.what, bundled, *mixer.inputs]
    gr.on([entry.select, mixer.shelf.change], handlers.choices, chosen, [tab.what, bundled], **quiet)
    tab.what.input(handlers.fitting, chosen, bundled, **quiet)
    kind.change(handlers.show_judge, kind, [bundled, file, words, pattern], queue=False, **quiet)
    asked = [tab.what, *tab.judge, *source, *mixer.inputs]
    for component in (tab.what, kind, bundled, file):
        component.change(handlers.about_judge, asked, tab.about_judge, trigger_mode="always_last", **quiet)
    entry.select(handlers.about_judge, asked, tab.about_judge, **quiet)
    buttons = tab.outputs[:4]
    gr.on([tab.start.click, words.submit, pattern.submit], handlers.begin, None, buttons, queue=False, **quiet).then(
        handlers.evaluate,
        [tab.what, *tab.judge, *tab.plan, *source, *mixer.inputs],
        tab.outputs,
        show_progress_on=tab.summary,
        concurrency_id=KIND,
        concurrency_limit=MAX_EVALUATIONS,
        api_visibility="private",
    ).failure(handlers.give_up, None, buttons, queue=False, **quiet)
    tab.cancel.click(handlers.cancel, None, None, queue=False, **quiet)
    kept = [tab.error, tab.note, tab.keep, *mixer.outputs]
    tab.keep.click(handlers.keep, [tab.measured, *mixer.inputs], kept, **quiet)
