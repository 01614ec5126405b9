"""Evaluation for programs, over real HTTP: with `gradio_client`, and with the MCP client of the package `mcp`."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from gradio_client import Client
from pages import EXAMPLES, Ready, serving, texts
from test_circuit_endpoints import as_agent
from test_endpoints import as_text, connected, from_text, refusal, said
from tiny import Tiny, make_vector, tiny

from neurosteer.artifacts.recipes import Recipe
from neurosteer.building.build import build
from neurosteer.evaluation import PatternJudge, TextClassifier, evaluate
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import read_examples
from neurosteer.steering.session import Session
from neurosteer.ui.evaluating import MOST_RANDOM, N_PROMPTS, neutral

VECTOR = make_vector([1], name="mood")
PROMPTS = ["the cat", "over the", "happy"]
ASKED: dict[str, Any] = {"use": [as_text(VECTOR)], "judge": "words:a,the", "prompts": PROMPTS,
                         "strengths": ["-1", "1"], "max_new_tokens": 6}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Ready(Session(tiny("llama").lm))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return connected(url)


def test_a_program_gets_the_receipt_that_the_library_writes_and_the_artifact_with_it(
    client: Client, llama: Tiny
) -> None:
    answer = client.predict(**ASKED, api_name="/evaluate")
    wanted = evaluate(
        llama.lm, VECTOR, PatternJudge(["a", "the"]), prompts=PROMPTS, strengths=(-1, 1), max_new_tokens=6, seed=0
    )
    assert answer["receipt"] == json.loads(json.dumps(dict(wanted.receipt.data)))
    assert answer["table"] == answer["receipt"]["table"]
    assert len(answer["warnings"]) == 1 and "other weights" in answer["warnings"][0]
    assert [row["text"] for row in answer["texts"]] == [row.text for row in wanted.rows]
    assert [row["score"] for row in answer["texts"]] == [row.score for row in wanted.rows]
    kept = from_text(answer["artifact"])
    assert [dict(receipt.data) for receipt in kept.receipts] == [answer["receipt"]]
    assert kept.directions[1].equal(VECTOR.directions[1])


def test_a_mixture_is_measured_and_belongs_to_no_artifact(client: Client, llama: Tiny) -> None:
    other = make_vector([1], name="other", seed=3)
    use = [as_text(VECTOR) + ":0.5", as_text(other) + ":-1"]
    answer = client.predict(**{**ASKED, "use": use, "seed": 4}, api_name="/evaluate")
    recipe = Recipe.of((VECTOR, 0.5), (other, -1.0))
    judge = PatternJudge(["a", "the"])
    wanted = evaluate(llama.lm, recipe, judge, prompts=PROMPTS, strengths=(-1, 1), max_new_tokens=6, seed=4)
    assert answer["receipt"]["rows"] == json.loads(json.dumps(wanted.receipt.data["rows"]))
    assert answer["artifact"] is None


def test_an_agent_trains_a_judge_and_is_warned_of_a_weak_one(url: str) -> None:
    alike = list(texts("the same", 40))
    random.Random(0).shuffle(alike)
    labelled = {"positive": alike[::2], "negative": alike[1::2]}
    result = as_agent(url, "evaluate", {**ASKED, "judge": "", **labelled})
    assert not result.isError
    answer = json.loads(said(result))
    judge = TextClassifier.train(ContrastSet(tuple(alike[::2]), tuple(alike[1::2])))
    assert answer["receipt"]["judge"]["accuracy"] == pytest.approx(judge.accuracy, abs=1e-4)
    assert judge.is_weak and "too weak" in answer["warnings"][-1]


def test_neutral_prompts_and_a_bundled_judge_are_there_for_the_asking(client: Client) -> None:
    answer = client.predict(
        use=[as_text(VECTOR)], judge="gratitude", strengths=["1"], max_new_tokens=4, api_name="/evaluate"
    )
    settings = answer["receipt"]["settings"]
    assert settings["n_prompts"] == N_PROMPTS and settings["n_random"] == min(MOST_RANDOM, N_PROMPTS)
    assert list(dict.fromkeys(row["prompt"] for row in answer["texts"])) == list(neutral(N_PROMPTS))
    examples = read_examples("gratitude")
    assert f"({len(examples.positive)} + {len(examples.negative)} texts)" in answer["receipt"]["judge"]["name"]


def test_texts_that_built_the_artifact_do_not_judge_it(client: Client, llama: Tiny) -> None:
    own = as_text(build(llama.lm, EXAMPLES, layers=1, name="own", calibrate=False))
    given: dict[str, Any] = {"positive": list(EXAMPLES.positive), "negative": list(EXAMPLES.negative)}
    half = client.predict(**given, layers="1", calibrate=False, keep_half=True, api_name="/build")["artifact"]
    assert from_text(half).provenance.hold_out == 0.5 and not from_text(half).calibration.measured
    labelled: dict[str, Any] = {"judge": "", **given}
    assert "was built from all texts" in refusal(client, "evaluate", **{**ASKED, **labelled, "use": [own]})
    answer = client.predict(**{**ASKED, **labelled, "use": [half]}, api_name="/evaluate")
    assert "held out" in answer["receipt"]["judge"]["name"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use": []}, "use names 0 artifacts"),
        ({"use": ["no-such-vector"]}, "no-such-vector"),
        ({"judge": ""}, "There is no judge"),
        ({"judge": "odd"}, "'odd'"),
        ({"judge": "sentiment", "positive": ["a", "b"], "negative": ["c", "d"]}, "leave positive and negative out"),
        ({"judge": "refusal", "positive": ["a", "b"], "negative": ["c", "d"]}, "leave positive and negative out"),
        ({"judge": "regex:("}, "no regular expression"),
        ({"judge": "words:"}, "pattern"),
        ({"judge": "", "positive": ["a"], "negative": ["b"]}, "at least 2"),
        ({"strengths": ["x"]}, "'x'"),
        ({"strengths": ["0"]}, "no other than 0"),
        ({"strengths": []}, "0 strengths"),
        ({"prompts": [str(number) for number in range(33)]}, "33 prompts"),
        ({"prompts": ["  "]}, "not empty"),
        ({"samples": 6}, "6 samples"),
        ({"max_new_tokens": 1000}, "1,000 tokens"),
        ({"max_new_tokens": 0}, "0 tokens"),
        ({"seed": "x"}, "whole number"),
        ({"model": "no-such-model"}, "not on offer"),
    ],
)
def test_a_mistake_is_one_clear_line(client: Client, changes: dict[str, Any], words: str) -> None:
    assert words in refusal(client, "evaluate", **{**ASKED, **changes})


def test_a_mistake_is_one_clear_line_to_an_agent_too(url: str) -> None:
    result = as_agent(url, "evaluate", {**ASKED, "judge": "odd"})
    assert result.isError and "'odd'" in said(result) and "\n" not in said(result)


def test_strangers_patterns_are_not_taken(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/space")
    assert "Patterns are not taken" in refusal(client, "evaluate", **{**ASKED, "judge": "regex:a"})


def test_what_takes_too_long_is_stopped(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.ui.work.MAX_SECONDS", 0.0)
    assert "was stopped; ask for fewer texts" in refusal(client, "evaluate", **ASKED)
