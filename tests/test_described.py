"""Examples from a description: the model's own answers to neutral prompts, told to and told otherwise."""

import csv
import threading
from pathlib import Path
from typing import Any

import pytest
from checks import Run
from tiny import Tiny

from neurosteer.artifacts.storage import load
from neurosteer.building import described
from neurosteer.building.described import asked_to, described_examples
from neurosteer.errors import Cancelled, ExamplesError, UsageError
from neurosteer.evaluation.intervals import Estimate
from neurosteer.evaluation.worth import Worth, worth_of
from neurosteer.examples.files import bundled_lines, described_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

TOLD = ("Write like a pirate.", "Write plainly.")


def test_prompts_of_descriptions_are_in_no_other_set() -> None:
    mine = described_prompts()
    others = {line for name in ("neutral", "calibration", "everyday") for line in bundled_lines(f"{name}_prompts.txt")}
    assert len(mine) == len(set(mine)) == 64 and not others & set(mine)


def test_answers_are_what_the_session_writes_and_are_kept_with_the_bare_prompts(llama: Tiny) -> None:
    prompts = ["One thing.", "Another thing."]
    found = described_examples(llama.lm, *TOLD, prompts=prompts, samples=2, max_new_tokens=6, seed=3)
    assert found.paired and "pirate" in found.source
    assert not any("pirate" in str(asked) or "plainly" in str(asked) for asked in found.positive_prompts)
    for told, texts in zip(TOLD, (found.positive, found.negative), strict=True):
        rows = [Row(asked_to(told, prompt), sample=sample) for prompt in prompts for sample in range(2)]
        written = Session(llama.lm).generate(rows, max_new_tokens=6, sampling=Sampling(seed=3))
        assert set(texts) <= {row.text.replace("\0", "").strip() for row in written}
    dropped = sum(found.dropped.values())
    assert len(found.positive) + dropped == 4 and found.positive_prompts == found.negative_prompts


def test_texts_are_read_as_answers_to_the_bare_prompt(llama: Tiny) -> None:
    found = described_examples(llama.lm, *TOLD, prompts=["One thing.", "Another thing."], max_new_tokens=6)
    framed = llama.lm.frame(found.positive, "answer", max_tokens=64, prompts=list(map(str, found.positive_prompts)))
    for text, asked, one in zip(found.positive, found.positive_prompts, framed, strict=True):
        start = llama.lm.prompt_ids(str(asked))
        assert one.ids[: one.start] == start and llama.lm.tokenizer.decode(one.ids[one.start :]) == text


@pytest.mark.parametrize(
    ("instruct", "against", "said"),
    [
        ("", "x", "instruct is empty"),
        ("x", " ", "against is empty"),
        ("x" * 1001, "y", "1,001 characters"),
        ("Be kind.", " be KIND. ", "are the same"),
    ],
)
def test_instructions_that_say_nothing_are_refused(llama: Tiny, instruct: str, against: str, said: str) -> None:
    with pytest.raises(ExamplesError, match=said):
        described_examples(llama.lm, instruct, against)


def test_a_model_that_answers_alike_is_said_to(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parrot:
        def __init__(self, _: Any) -> None: ...

        def generate(self, rows: list[Row], **_: Any) -> list[Row]:
            return [Row(row.prompt, text="the same") for row in rows]

    monkeypatch.setattr(described, "Session", Parrot)
    with pytest.raises(ExamplesError, match="answers alike whatever it is told: of 128 pairs of answers 0 differ"):
        described_examples(llama.lm, *TOLD)


def test_numbers_out_of_range_and_cancelling(llama: Tiny) -> None:
    wrongs: list[dict[str, Any]] = [{"samples": 0}, {"samples": 21}, {"max_new_tokens": 201}]
    for wrong in wrongs:
        with pytest.raises(UsageError):
            described_examples(llama.lm, *TOLD, **wrong)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        described_examples(llama.lm, *TOLD, cancel=cancel)


def test_the_command_builds_from_a_description_and_says_what_it_is_worth(
    run: Run, model_folder: Path, tmp_path: Path
) -> None:
    given = ("--instruct", TOLD[0], "--against", TOLD[1], "--model", model_folder, "--device", "cpu")
    ran = run("build", *given, "--answers", 1, "--layers", 2, "--no-calibrate", "--out", tmp_path / "pirate")
    assert ran.code == 0, ran.err
    assert "told in plain words" in ran.out and load(tmp_path / "pirate").name == "write-like-a-pirate-caa"


def test_answers_are_saved_to_be_edited_and_read_again(run: Run, model_folder: Path, tmp_path: Path) -> None:
    given = ("--instruct", TOLD[0], "--against", TOLD[1], "--model", model_folder, "--device", "cpu")
    ran = run("build", *given, "--answers", 1, "--save-examples", tmp_path / "pirate.csv")
    assert ran.code == 0 and "Edit them" in ran.out, ran.err
    with (tmp_path / "pirate.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    examples = read_examples(str(tmp_path / "pirate.csv"))
    assert len(examples.positive) == len(rows) and examples.positive_prompts[0] == rows[0]["prompt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no examples"),
        (("sentiment", "--instruct", "x", "--against", "y"), "both"),
        (("--instruct", "x", "--against", "y", "--label", "z"), "both"),
        (("--instruct", "x", "--against", "y", "--negative", "z.txt"), "both"),
        (("--instruct", "x", "--against", "y", "--save-examples", "mine.csv"), "exists"),
        (("--instruct", "x", "--against", "y", "--save-examples", "mine.csv/in.csv"), "mine.csv"),
        (("--instruct", "x"), "go together"),
        (("sentiment", "--save-examples", "x.csv"), "--save-examples"),
    ],
)
def test_half_a_description_is_refused_before_the_model_is_loaded(
    run: Run, words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("edited", encoding="utf-8")
    ran = run("build", *words, "--model", "no/such-model")
    assert ran.code == 2 and said in ran.err


def test_little_worth_is_said_with_a_remedy() -> None:
    def worth(up: float, right: float) -> Worth:
        shares = {-1.0: Estimate(0.3, 0.1, 0.5), 0.0: Estimate(0.5, 0.3, 0.7), 1.0: Estimate(up, up - 0.2, 1.0)}
        return Worth(shares, {-1.0: shares[-1.0], 1.0: shares[1.0]}, right, 16)

    assert len(worth(0.9, 0.9).sentences) == 1
    assert "no clear effect" in worth(0.6, 0.9).sentences[1]
    assert "give examples instead" in worth(0.9, 0.6).sentences[1]


@pytest.mark.embedded
def test_on_the_embedded_model_a_description_steers(embedded_lm: LanguageModel) -> None:
    from neurosteer.building.build import build

    told = ("Write in a very positive, delighted tone.", "Write in a very negative, disappointed tone.")
    examples = described_examples(embedded_lm, *told)
    assert len(examples.positive) > 90
    worth = worth_of(embedded_lm, build(embedded_lm, examples, layers=16), examples, *told)
    assert worth.judge_right > 0.65
    assert worth.steered[1.0].value > worth.steered[-1.0].value + 0.2, worth.sentences


def test_what_was_built_is_kept_where_its_worth_cannot_be_measured(
    run: Run, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Worth:
        raise UsageError("the texts hold no word")

    monkeypatch.setattr("neurosteer.evaluation.worth.worth_of", fails)
    given = ("--instruct", "像海盗一样写", "--against", "写得平实", "--model", model_folder, "--device", "cpu")
    ran = run("build", *given, "--answers", 1, "--layers", 2, "--no-calibrate", "--out", tmp_path / "one")
    assert ran.code == 0 and "hold no word" in ran.out, ran.err
    assert load(tmp_path / "one").name.startswith("described-")
