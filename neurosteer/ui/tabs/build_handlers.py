"""What happens on the Build tab."""

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import gradio as gr

from neurosteer.errors import Cancelled, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.progress import JobArguments, Progress
from neurosteer.ui.evaluating import check_judges_texts
from neurosteer.ui.jobs import problem
from neurosteer.ui.mixer import Mix
from neurosteer.ui.settings import OF_SOME_METHODS, Settings, build_options, check_sae
from neurosteer.ui.shelf import put, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.show.layer_figure import layer_figure
from neurosteer.ui.source import Source, read_source
from neurosteer.ui.tabs.startable import Startable, ended
from neurosteer.ui.wiring import Updates
from neurosteer.ui.work import KIND, at_most, in_words

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact

NOTHING_YET = {
    "bundled": "Pick a set to see what is in it.",
    "file": "Choose a file to see what is read from it.",
    "files": "Choose both files to see what is read from them.",
    "dataset": "Name a data set to see what is read from it.",
    "described": "Say what it is to do, and what not; then have the answers written.",
    "paste": "Fill both boxes to see what is read from them.",
}
AUTOMATIC = ("automatic", "")
_WORTH_S = 60.0  # for what is measured of a build by the way
_IN_WORDS = {
    ("rank", "difference"): "how much more active",
    ("rank", "dprime"): "how clearly it tells them apart",
    ("rank", "write"): "how much it pushes that way",
    ("rank", "rate"): "how much more often it fires",
    ("rank", "probe"): "what a classifier relies on",
    ("weight", "difference"): "how much more active",
    ("weight", "target"): "how active on its own side",
    ("sides", "positive"): "features of texts that show it",
    ("sides", "both"): "and of texts that don’t, turned down",
}


def _options_of(name: str, values: Iterable[str]) -> list[tuple[str, str]]:
    """The choices of a dropdown for the parameter `name`, in words where there are some."""
    said = [(f"{value}: {_IN_WORDS[name, value]}" if (name, value) in _IN_WORDS else value, value) for value in values]
    return [AUTOMATIC, *said]


class BuildHandlers(Startable):
    """What happens on the Build tab."""

    kind = KIND

    def choices(self) -> Updates:
        """The methods and the options of Advanced, from the library; it is not imported before the page is up."""
        self.models.holder().wait_for_libraries()
        from neurosteer.artifacts.circuit import CIRCUIT_OPERATIONS
        from neurosteer.methods import METHODS
        from neurosteer.methods.sae import SIDES, WEIGHTS
        from neurosteer.models.language_model import FRAMINGS
        from neurosteer.reading.request import TOKENS

        options = {
            "framing": FRAMINGS,
            "tokens": TOKENS,
            "operation": CIRCUIT_OPERATIONS,
            "weight": WEIGHTS,
            "sides": SIDES,
        }
        choices = {name: _options_of(name, values) for name, values in options.items()}
        choices["method"] = [(f"{method.name}: {method.explanation}", method.name) for method in METHODS.values()]
        return {name: gr.update(choices=offered) for name, offered in choices.items()}

    def show_source(self, kind: str) -> Updates:
        """Which of the groups of inputs is visible."""
        return {f"{value}_group": gr.update(visible=value == kind) for value in NOTHING_YET}

    def show_parameters(self, method: str) -> Updates:
        """Those settings that the method takes; rank and top_k begin anew, because they mean something else."""
        self.models.holder().wait_for_libraries()
        from neurosteer.methods import cna, find_method, sae

        takes = find_method(method).defaults
        counted, share = ("Features", "A count") if method == "sae" else ("Neurons", "A count, or a share below 1")
        ranks = {"cna": cna.RANKS, "sae": sae.RANKS}.get(method, ())
        changes: dict[str, dict[str, Any]] = {
            "rank": {
                "choices": _options_of("rank", ranks),
                "value": "",
                "info": f"What makes a {counted.lower()[:-1]} matter",
            },
            "top_k": {"label": f"{counted} (top_k)", "info": share, "value": ""},
        }
        return {name: gr.update(visible=name in takes, **changes.get(name, {})) for name in OF_SOME_METHODS}

    def preview(self, request: gr.Request, source: Source) -> str:
        """What is read from the source as it stands."""
        self.jobs.remove_uploads_later(request.session_hash, source.file, source.positive_file, source.negative_file)
        try:
            examples = read_source(source)
        except Exception as error:
            return render.error_line(problem(error))
        return render.hint(NOTHING_YET[source.kind]) if examples is None else render.examples_read(examples)

    def build(
        self,
        request: gr.Request,
        progress: gr.Progress,
        source: Source,
        settings: Settings,
        mix: Mix,
        described: tuple[str, ...] = (),
    ) -> Updates:
        """Build, and put the result on the visitor's shelf; of answers to the two lines of a description say what they
        are worth. Whatever goes wrong becomes one line, inputs stay."""
        try:
            examples = read_source(source)
            if examples is None:
                raise UsageError(f"There are no examples yet. {NOTHING_YET[source.kind]}")
            cancel = self.jobs.current(request.session_hash, KIND)
            artifact, seconds = self.make(examples, settings, in_words(progress), cancel, mix.model)
            worth: tuple[str, ...] = ()
            if source.kind == "described" and settings.calibrate:
                worth = self.worth(artifact, examples, described, in_words(progress), cancel, mix.model)
            shelf, label = put(mix.shelf, artifact)
            self.jobs.remove_later(request.session_hash, zip_file(artifact))
            mixed = mix.choosing(shelf, mix.chosen or [label]).updates()
            return {**ended(), **_result(artifact, label, seconds, examples, worth), **mixed}
        except Cancelled:
            return ended(note=render.note_line("Cancelled: nothing was built, what you entered is still here."))
        except Exception as error:
            return ended(error=render.error_line(problem(error)))

    def make(
        self,
        examples: ContrastSet,
        settings: Settings,
        progress: Progress,
        cancel: threading.Event,
        model: str | None = None,
    ) -> "tuple[Artifact, float]":
        """The artifact, once the model is there, and the seconds that building took. Raises the library's errors, and
        `UsageError` when it takes too long."""
        with at_most(cancel, "give fewer texts"):
            session = self.models.holder(model).wait(progress, cancel)
            from neurosteer.building.build import build

            options = build_options(settings)
            if "sae" in options:
                check_sae(options["sae"], session.lm)
            started = time.monotonic()
            artifact = session.run(build, examples, progress=progress, cancel=cancel, **options)
        return artifact, time.monotonic() - started

    def worth(
        self,
        artifact: "Artifact",
        examples: ContrastSet,
        described: tuple[str, ...],
        progress: Progress,
        cancel: threading.Event,
        model: str | None = None,
    ) -> tuple[str, ...]:
        """Sentences that say what answers to a description are worth as examples; nothing of it undoes the build."""
        if not described:
            return ("What it is worth was not measured: these answers were not written on this page.",)
        try:
            check_judges_texts(examples)
            with at_most(cancel, "measure it on the Evaluate tab", _WORTH_S):
                session = self.models.holder(model).wait(progress, cancel)
                from neurosteer.evaluation.judges import TextClassifier
                from neurosteer.evaluation.worth import judged, worth_texts

                given: JobArguments = {"progress": progress, "cancel": cancel}
                texts = session.run(worth_texts, artifact, *described, **given)
                return judged(TextClassifier.train(examples, cancel=cancel), texts).sentences
        except Cancelled:
            return ("What it is worth was not measured; the Evaluate tab does that.",)
        except Exception as error:
            return (f"What it is worth could not be measured: {problem(error)}",)

    def try_it(self, label: str, mix: Mix) -> Updates:
        """To the Steer tab, with the newest artifact alone."""
        return {"tabs": gr.update(selected="steer"), **mix.choosing(mix.shelf, [label]).updates()}


def _result(
    artifact: "Artifact", label: str, seconds: float, examples: ContrastSet, worth: tuple[str, ...] = ()
) -> Updates:
    source = artifact.provenance
    figure = layer_figure(source.separation, artifact.layers, source.candidates)
    return {
        "result": render.built(artifact, label, seconds, examples, worth),
        "features": render.made_of(artifact),
        "plot": gr.update(value=figure, visible=figure is not None),
        "download": gr.update(value=zip_file(artifact), visible=True),
        "try_it": gr.update(visible=True),
        "latest": label,
    }
