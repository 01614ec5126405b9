"""What a recipe does to capability: EleutherAI's lm-evaluation-harness on the steered model, beside the unsteered one.

The harness is an extra: `pip install "neurosteer[harness]"`. Its tasks, prompts and metrics are used as they are; only
the model's passes are wrapped, for log-likelihoods and generation alike.
"""

import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.files import write_files
from neurosteer.artifacts.recipes import UNSTEERED, Recipe, check_recipes_fit
from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import check_cancelled
from neurosteer.steering.plans import applied, compile_plan
from neurosteer.validation import is_int

logger = logging.getLogger(__name__)

RESULTS_FILE, SAMPLES_FILE = "harness.json", "harness_samples.jsonl"
_BOOTSTRAPS = 1000  # only for metrics that are no mean; the harness's own 100,000 take minutes


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task over `n` documents, unsteered and steered, in the metric's own unit.

    Errors are standard errors; None stands for what the harness has no finite number for. `filter` is how answers were
    read off the texts.
    """

    task: str
    metric: str
    filter: str
    n: int
    unsteered: float | None
    steered: float | None
    unsteered_error: float | None
    steered_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessResult:
    """What the harness measured, and for every document what was answered without and with the recipe (`samples`)."""

    model: str
    recipe: tuple[str, ...]
    chat_template: bool
    limit: int | None
    harness_version: str
    figures: tuple[TaskFigure, ...]
    samples: tuple[Mapping[str, Any], ...]

    def data(self) -> dict[str, Any]:
        """All but the samples, for JSON."""
        found = asdict(self)
        del found["samples"]
        return found


def harness(
    lm: LanguageModel,
    recipe: Recipe | Artifact,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    raw: bool = False,
    cancel: threading.Event | None = None,
) -> HarnessResult:
    """Run tasks of lm-evaluation-harness on the unsteered model and on the steered one.

    Args:
        tasks: names the harness knows, or YAML files that define one. (A YAML file of the harness may name Python
            functions, which it runs; relative paths of data in it start at the working directory.)
        limit: only the first documents of each task, this many.
        batch_size: requests in one pass.
        raw: no chat template, for a chat model.
        cancel: ends the run before the next pass.

    Raises:
        UsageError: the harness is not installed, a task is unknown or failed, or an option is out of its range.
        MismatchError: an artifact was made on a model of another shape.
        Cancelled: `cancel` was set.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    _check(lm, chosen, {"limit": limit, "batch_size": batch_size})
    manager = find_tasks(tasks)
    chat = lm.chat and not raw
    model = _steered_model(lm, batch_size, cancel)
    with _errors_of_the_harness():
        unsteered = _evaluated(model, UNSTEERED, tasks, manager, limit, chat)
        steered = _evaluated(model, chosen, tasks, manager, limit, chat)
    return HarnessResult(
        lm.name,
        tuple(f"{use.artifact.name}:{use.strength:g}" for use in chosen.uses),
        chat,
        limit,
        unsteered["lm_eval_version"],
        tuple(_figures(unsteered, steered)),
        (*_samples(unsteered, "unsteered"), *_samples(steered, "steered")),
    )


def write_harness(result: HarnessResult, folder: Path) -> tuple[Path, ...]:
    """Write the figures (`harness.json`) and every answer (`harness_samples.jsonl`); returns the paths.

    Raises `UsageError` if the folder cannot be written.
    """
    samples = "\n".join(json.dumps(dict(row)) for row in result.samples)
    texts = {RESULTS_FILE: json.dumps(result.data(), indent=2), SAMPLES_FILE: samples}
    return write_files(folder, {name: f"{text}\n" for name, text in texts.items()})


# --- asking the harness ----------------------------------------------------------------------------------------------


def _check(lm: LanguageModel, recipe: Recipe, counts: Mapping[str, int | None]) -> None:
    for name, count in counts.items():
        if count is not None and (not is_int(count) or count < 1):
            raise UsageError(f"{name} is {count!r:.40}; it must be a whole number from 1.")
    for warning in check_recipes_fit([recipe], lm.reference):
        logger.warning(warning)


def find_tasks(tasks: Sequence[str]) -> Any:
    """The harness's own list of tasks (a `TaskManager`), which knows `tasks`; takes seconds where one is a name.

    Raises `UsageError` if the harness is not installed or a task is unknown to it.
    """
    if isinstance(tasks, str) or not tasks:
        raise UsageError(f"tasks is {tasks!r:.60}; give a list of at least one task's name or YAML file.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError('lm-evaluation-harness is not installed; pip install "neurosteer[harness]".') from error
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise UsageError(f"There is no task file {file[:200]!r}; give a YAML file of lm-evaluation-harness.")
    manager = TaskManager(include_defaults=len(files) < len(tasks))  # reading the harness's own tasks takes seconds
    for task in tasks:
        if task not in files and task not in manager.all_tasks:
            raise UsageError(f"lm-evaluation-harness has no task {task[:80]!r}; `lm-eval ls tasks` lists them.")
    return manager


def _evaluated(model: Any, recipe: Recipe, tasks: Sequence[str], manager: Any, limit: int | None, chat: bool) -> Any:
    """What `simple_evaluate` returns, with the model steered by `recipe`."""
    model.recipe = recipe
    return import_module("lm_eval").simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        bootstrap_iters=_BOOTSTRAPS,
    )


@contextmanager
def _errors_of_the_harness() -> Iterator[None]:
    """A mistake in a task shows as whatever its template, its data or its metric raises."""
    try:
        yield
    except NeuroSteerError:
        raise
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"lm-evaluation-harness stopped with {type(error).__name__}: {first_line[:300]}; see to the task."
        ) from error


def _steered_model(lm: LanguageModel, batch_size: int, cancel: threading.Event | None) -> Any:
    """The harness's own model class around `lm`, whose passes follow its `recipe`."""
    HFLM: Any = import_module("lm_eval.models.huggingface").HFLM  # its decorators hide its type

    class SteeredModel(HFLM):
        recipe = UNSTEERED

        def steered(self, rows: int) -> AbstractContextManager[None]:
            check_cancelled(cancel, "The harness")
            return applied(lm, compile_plan(lm, [self.recipe] * rows))

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            # Rows are filled up on the right and no mask is given: what stands there is read by no token before it.
            with self.steered(len(inps)):
                return super()._model_call(inps, attn_mask, labels)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            copies = max(int(options.get(name) or 1) for name in ("num_beams", "num_return_sequences"))
            with self.steered(len(context) * copies):
                return super()._model_generate(context, max_length, stop, **options)

    # The harness may give the tokenizer a padding token and turn its padding side: it gets one of its own. And it
    # warns that a model which is loaded already should not be spread over processes, which nobody asks for here.
    with _quiet(HFLM.__module__):
        return SteeredModel(
            pretrained=lm.model,
            tokenizer=deepcopy(lm.tokenizer),
            batch_size=batch_size,
            chat_template_args=lm.template_variables,
        )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    harness_logger = logging.getLogger(name)
    before = harness_logger.level
    harness_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness_logger.setLevel(before)


# --- reading its answer ----------------------------------------------------------------------------------------------


def _figures(unsteered: Mapping[str, Any], steered: Mapping[str, Any]) -> Iterator[TaskFigure]:
    for task, plain in unsteered["results"].items():
        other = steered["results"][task]
        for key in plain:
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            errors = f"{metric}_stderr,{filter_name}"
            yield TaskFigure(
                task,
                metric,
                filter_name,
                int(unsteered.get("n-samples", {}).get(task, {}).get("effective", 0)),
                _number(plain[key]),
                _number(other[key]),
                _number(plain.get(errors)),
                _number(other.get(errors)),
                unsteered.get("higher_is_better", {}).get(task, {}).get(metric),
            )


def _samples(found: Mapping[str, Any], recipe: str) -> Iterator[dict[str, Any]]:
    """One row per document: the answers as the harness read them, and what each metric made of them."""
    for task, samples in found["samples"].items():
        for sample in samples:
            yield {
                "recipe": recipe,
                "task": task,
                "document": sample["doc_id"],
                "filter": sample["filter"],
                "target": str(sample["target"]),
                "answers": json.loads(json.dumps(sample["filtered_resps"], default=str)),
                "metrics": {name: _number(sample[name]) for name in sample["metrics"]},
            }


def _number(value: Any) -> float | None:
    """The harness writes "N/A" for an error it has not; some metrics are no number for one document."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
