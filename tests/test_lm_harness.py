"""lm-evaluation-harness on steered models, held against log-likelihoods and texts computed row by row by hand."""

import importlib
import importlib.util
import json
import threading
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Run, assert_one_clear_line, refused
from tiny import Tiny, Writes, ablating, make_circuit, make_vector, naive_greedy, naive_logits, tiny, writes_of

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import save
from neurosteer.errors import Cancelled, MismatchError, UsageError
from neurosteer.evaluation.harness import HarnessResult, harness, write_harness
from neurosteer.models.language_model import LanguageModel

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-evaluation-harness is not installed (the extra "harness")'
)
FOLDER = Path(__file__).parent / "harness"
ANIMALS, NUMBERS = "tests/harness/animals.yaml", "tests/harness/numbers.yaml"
MIXED = (
    Use(make_vector((1, 2), seed=1), 1.5),
    Use(make_circuit(seed=2), -2.0),
    Use(ablating([3], seed=3)),
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tasks name their data from the repository's root; nothing is looked for on the Hub or left in a cache."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    datasets = pytest.importorskip("datasets") if importlib.util.find_spec("lm_eval") else None
    if datasets is not None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    yield


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def answers(found: HarnessResult, task: str, recipe: str) -> list[Any]:
    return [row["answers"] for row in found.samples if row["task"] == task and row["recipe"] == recipe]


def figure(found: HarnessResult, task: str, metric: str) -> tuple[float | None, float | None]:
    (one,) = [one for one in found.figures if (one.task, one.metric) == (task, metric)]
    return one.unsteered, one.steered


def naive_choices(this: Tiny, writes: Writes) -> list[list[float]]:
    """log p(choice | question), in nats, a row at a time."""
    encode = this.lm.tokenizer
    found = []
    for row in rows("animals"):
        context = f"Question: {row['question']}\nAnswer:"
        n_context = len(encode(context)["input_ids"])
        scores = []
        for choice in row["choices"]:
            ids = encode(f"{context} {choice}")["input_ids"]
            logprobs = naive_logits(this, ids, writes).log_softmax(-1)
            scores.append(float(sum(logprobs[place - 1, ids[place]] for place in range(n_context, len(ids)))))
        found.append(scores)
    return found


def accuracy(scores: Sequence[Sequence[float]], *, by_length: bool) -> float:
    right = 0
    for row, found in zip(rows("animals"), scores, strict=True):
        weighed = [
            score / (len(choice) if by_length else 1) for score, choice in zip(found, row["choices"], strict=True)
        ]
        right += weighed.index(max(weighed)) == row["answer"]
    return right / len(scores)


@needs_harness
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_log_likelihoods_are_those_of_a_naive_steered_pass(architecture: str) -> None:
    this = tiny(architecture)
    found = harness(this.lm, Recipe(MIXED), [ANIMALS], batch_size=5, raw=True)
    for recipe, writes, place in (("unsteered", Writes(), 0), ("steered", writes_of(MIXED), 1)):
        naive = naive_choices(this, writes)
        measured = [[score for score, _greedy in row] for row in answers(found, "animals", recipe)]
        assert torch.tensor(measured) == pytest.approx(torch.tensor(naive), rel=1e-4, abs=1e-3)
        assert figure(found, "animals", "acc")[place] == pytest.approx(accuracy(naive, by_length=False))
        assert figure(found, "animals", "acc_norm")[place] == pytest.approx(accuracy(naive, by_length=True))
    assert all(one.n == 12 for one in found.figures)


@needs_harness
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_texts_are_those_of_naive_steered_decoding_though_prompts_differ_in_length(architecture: str) -> None:
    this = tiny(architecture)
    found = harness(this.lm, Recipe(MIXED), [NUMBERS], batch_size=4, raw=True)
    for recipe, writes in (("unsteered", Writes()), ("steered", writes_of(MIXED))):
        naive = []
        for row in rows("numbers"):
            ids = this.lm.tokenizer(f"{row['question']} Answer with one number:")["input_ids"]
            # Tiny models name no end token, so the harness writes on until every row of its batch has ended.
            text = this.lm.tokenizer.decode(naive_greedy(this, ids, writes, 12, stop=()), skip_special_tokens=True)
            naive.append([text.split("\n")[0]])
        assert answers(found, "numbers", recipe) == naive
    assert answers(found, "numbers", "unsteered") != answers(found, "numbers", "steered")


@needs_harness
def test_beams_are_steered_like_a_single_text(llama: Tiny, tmp_path: Path) -> None:
    task = tmp_path / "beams.yaml"
    given = (FOLDER / "numbers.yaml").read_text()
    task.write_text(given.replace("task: numbers", "task: beams").replace("do_sample: false", "num_beams: 3"))
    recipe = Recipe.of(ablating([1], seed=4), (make_circuit(seed=2), 3.0))  # ablations need as many rows as the pass
    many = harness(llama.lm, recipe, [str(task)], batch_size=4, raw=True)
    alone = harness(llama.lm, recipe, [str(task)], batch_size=1, raw=True)
    assert answers(many, "beams", "steered") == answers(alone, "beams", "steered")
    assert answers(many, "beams", "steered") != answers(many, "beams", "unsteered")


@needs_harness
def test_unsteered_is_the_harness_own_model_and_nothing_is_left_on_ours(llama: Tiny) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    evaluate: Any = importlib.import_module("lm_eval").simple_evaluate
    model_class: Any = HFLM
    tokenizer = llama.lm.tokenizer
    before = (tokenizer.padding_side, tokenizer.pad_token_id, len(tokenizer))
    found = harness(llama.lm, make_vector(seed=5), [ANIMALS, NUMBERS], batch_size=4, raw=True)
    assert (tokenizer.padding_side, tokenizer.pad_token_id, len(tokenizer)) == before
    plain = evaluate(
        model_class(pretrained=llama.model, tokenizer=deepcopy(tokenizer), batch_size=4),
        tasks=[ANIMALS, NUMBERS],
        task_manager=TaskManager(include_defaults=False),
    )
    for task, metric in (("animals", "acc"), ("animals", "acc_norm"), ("numbers", "exact_match")):
        (one,) = [one for one in found.figures if (one.task, one.metric) == (task, metric)]
        assert one.unsteered == plain["results"][task][f"{metric},none"]
        assert one.unsteered_error == pytest.approx(plain["results"][task][f"{metric}_stderr,none"])
    for task in ("animals", "numbers"):
        theirs = [sample["filtered_resps"] for sample in plain["samples"][task]]
        assert answers(found, task, "unsteered") == json.loads(json.dumps(theirs))


@needs_harness
def test_a_chat_model_is_asked_through_its_template_unless_raw(llama: Tiny) -> None:
    this = llama.lm
    recipe = Recipe.of((make_vector(seed=6), 2.0))
    found = harness(this, recipe, [ANIMALS], limit=3)
    assert found.chat_template and {one.n for one in found.figures} == {3}
    first = rows("animals")[0]
    turn = f"<|im_start|>user\nQuestion: {first['question']}\nAnswer:<|im_end|>\n<|im_start|>assistant"
    n_turn = len(this.token_ids(turn))  # the harness counts the line break after it to the answer
    scores = []
    for choice in first["choices"]:
        ids = this.token_ids(f"{turn}\n{choice}")
        logprobs = naive_logits(llama, ids, writes_of(recipe.uses)).log_softmax(-1)
        scores.append(float(sum(logprobs[place - 1, ids[place]] for place in range(n_turn, len(ids)))))
    assert [score for score, _ in answers(found, "animals", "steered")[0]] == pytest.approx(scores, rel=1e-4)
    assert not harness(this, recipe, [ANIMALS], limit=1, raw=True).chat_template


@needs_harness
@pytest.mark.embedded
def test_a_strong_push_costs_the_embedded_model_what_it_knows(embedded_lm: LanguageModel) -> None:
    shape = embedded_lm.shape
    noise = torch.randn(shape.d_model, generator=torch.Generator().manual_seed(0))
    push: Artifact = make_vector((15,), model=embedded_lm.reference, directions={15: noise}, norms={15: 100.0})
    weak = harness(embedded_lm, Recipe.of((push, 0.01)), [ANIMALS], batch_size=16, raw=True)
    strong = harness(embedded_lm, Recipe.of((push, 20.0)), [ANIMALS], batch_size=16, raw=True)
    known, barely_pushed = figure(weak, "animals", "acc")
    assert known is not None and known >= 0.5  # a quarter is chance
    assert barely_pushed == known
    lost = figure(strong, "animals", "acc")
    assert lost[0] == known and lost[1] is not None and lost[1] <= known - 0.2


@needs_harness
def test_results_are_written_as_json_and_one_line_per_answer(llama: Tiny, tmp_path: Path) -> None:
    found = harness(llama.lm, make_vector(seed=7), [ANIMALS], limit=2, raw=True)
    figures, samples = write_harness(found, tmp_path / "new")
    data = json.loads(figures.read_text())
    assert data["figures"][0]["task"] == "animals" and data["recipe"] == ["vector-7:1"] and data["limit"] == 2
    assert [json.loads(line) for line in samples.read_text().splitlines()] == [dict(row) for row in found.samples]
    assert len(found.samples) == 4
    (tmp_path / "file").write_text("")
    refused(lambda: write_harness(found, tmp_path / "file" / "new"), UsageError, "choose another folder")


@needs_harness
def test_the_command_prints_both_columns_and_the_same_json_as_it_writes(
    run: Run, model_folder: Path, llama: Tiny, tmp_path: Path
) -> None:
    save(make_vector(seed=8, model=llama.lm.reference), tmp_path / "v")
    asked = ("harness", "--use", f"{tmp_path / 'v'}:2", "--model", model_folder, "--dtype", "float32", "--raw")
    ran = run(*asked, "--tasks", f"{ANIMALS},{NUMBERS}", "--limit", 2, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data == json.loads((tmp_path / "out" / "harness.json").read_text())
    assert {one["task"] for one in data["figures"]} == {"animals", "numbers"}
    expected = harness(llama.lm, Recipe.of((make_vector(seed=8), 2.0)), [ANIMALS, NUMBERS], limit=2, raw=True)
    assert [one["steered"] for one in data["figures"]] == [one.steered for one in expected.figures]
    ran = run(*asked, "--tasks", NUMBERS, "--limit", 1)
    assert ran.code == 0 and "unsteered" in ran.out and "exact_match" in ran.out


@needs_harness
def test_mistakes_are_said_in_one_line(llama: Tiny, tmp_path: Path) -> None:
    push = make_vector(seed=9)

    def asked(*tasks: str, **options: Any) -> Any:
        return lambda: harness(llama.lm, push, list(tasks), raw=True, **options)

    refused(asked(), UsageError, "at least one")
    refused(asked("nowhere.yaml"), UsageError, "nowhere.yaml")
    refused(asked(ANIMALS, limit=0), UsageError, "limit")
    refused(asked(ANIMALS, batch_size=0), UsageError, "batch_size")
    broken = tmp_path / "broken.yaml"
    broken.write_text((FOLDER / "animals.yaml").read_text().replace("{{choices}}", "{{no_such_column | length}}"))
    refused(asked(str(broken)), UsageError, "lm-evaluation-harness")
    missing = tmp_path / "missing.yaml"
    missing.write_text((FOLDER / "animals.yaml").read_text().replace("animals.jsonl", "none.jsonl"))
    refused(asked(str(missing)), UsageError, "none.jsonl")
    other = make_vector(
        (1,), directions={1: torch.randn(8)}, model=make_vector().model.__class__("x", None, 4, 8, 9, "f")
    )
    refused(lambda: harness(llama.lm, other, [ANIMALS]), MismatchError)
    cancel = threading.Event()
    cancel.set()
    refused(asked(ANIMALS, cancel=cancel), Cancelled, "cancelled")


@needs_harness
def test_the_command_says_mistakes_in_one_line_before_it_loads_a_model(run: Run, tmp_path: Path) -> None:
    save(make_vector(), tmp_path / "v")
    asked = ("harness", "--use", tmp_path / "v", "--model", "no/such/model", "--tasks")
    assert_one_clear_line(run(*asked, "nowhere.yaml"), "nowhere.yaml")
    assert_one_clear_line(run(*asked, "no_such_task_at_all"), "no_such_task_at_all")
    assert_one_clear_line(run(*asked, ","), "at least one")


def test_without_the_harness_one_line_says_how_to_get_it(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    refused(lambda: harness(llama.lm, make_vector(), [ANIMALS]), UsageError, "neurosteer[harness]")
