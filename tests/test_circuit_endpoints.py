"""Circuits for programs, over real HTTP: with `gradio_client`, and with the MCP client of the package `mcp`."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
from gradio_client import Client
from mcp.types import CallToolResult
from pages import Ready
from test_endpoints import connected, from_text, refusal, said, serving, with_mcp, written
from tiny import Tiny, tiny

from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.circuits import (
    Selection,
    attribute,
    find_edges,
    find_unspecific,
    top_predictions,
)
from neurosteer.steering.session import Session
from neurosteer.ui import work
from neurosteer.ui.explaining import MAX_TOKENS, MOST_NEURONS
from neurosteer.ui.limits import MAX_PROMPT

PROMPT = "the cat runs over the"
ASKED: dict[str, Any] = {"prompt": PROMPT, "target": "a", "counterfactual": "t"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Ready(Session(tiny("llama").lm))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return connected(url)


def as_agent(url: str, name: str, arguments: dict[str, Any]) -> CallToolResult:
    return asyncio.run(with_mcp(url, lambda session: session.call_tool(name, arguments)))


def test_a_program_finds_a_circuit_and_steers_with_it(client: Client, llama: Tiny) -> None:
    answer = client.predict(**ASKED, neurons=20, attention="frozen", api_name="/attribute")
    found = attribute(llama.lm, PROMPT, "a", "t", raw=True, attention="frozen")
    select = Selection("top_k", 20)
    assert {key: answer[key] for key in ("metric", "target", "counterfactual", "neurons")} == found.data(select)
    assert answer["tokens"] == list(found.tokens[0]) and answer["warnings"] == []
    circuit = found.circuit(select=select)
    assert from_text(answer["artifact"]).neurons.tolist() == circuit.neurons.tolist()
    assert (answer["kind"], answer["model"], answer["layers"]) == ("neuron-circuit", "tiny/llama", circuit.layers)
    for key, recipe in (("predictions", Recipe()), ("predictions_without", Recipe.of((circuit, -1.0)))):
        wanted = top_predictions(llama.lm, PROMPT, recipe, 8, raw=True)
        assert [one["text"] for one in answer[key]] == [one.text for one in wanted]
        assert [one["probability"] for one in answer[key]] == pytest.approx([one.probability for one in wanted], 1e-4)
    steered = client.predict("the cat", [answer["artifact"] + ":-1"], greedy=True, max_new_tokens=8, api_name="/steer")
    assert steered["use"] == [{"name": circuit.name, "strength": -1.0}]
    assert steered["steered"]["text"] == written(llama.lm, Recipe((Use(circuit, multiplier=0.0),)), tokens=8)


def test_a_chat_and_what_is_left_out_are_as_asked_for(client: Client, llama: Tiny) -> None:
    chat: dict[str, Any] = {
        "prompt": "Why?",
        "target": " rained",
        "seed_response": "Because it",
        "chat": True,
        "specific": True,
    }
    answer = client.predict(**chat, neurons=30, api_name="/attribute")
    unspecific = find_unspecific(llama.lm)
    found = attribute(llama.lm, "Why?", " rained", seed_response="Because it", universal=unspecific)
    assert answer["neurons"] == found.data(Selection("top_k", 30))["neurons"]
    assert answer["universal"] == [list(pair) for pair in unspecific.all] != []
    assert answer["warnings"] == [f"' rained' is 4 tokens; its first, {answer['target']!r}, is taken."]
    kept = client.predict(**ASKED, keep_universal=True, api_name="/attribute")
    assert kept["universal"] == []


def test_an_agent_sees_how_neurons_feed_one_another(url: str, llama: Tiny) -> None:
    result = as_agent(url, "edges", {**ASKED, "neurons": 60, "targets": 8, "count": 5, "keep_universal": True})
    assert not result.isError
    answer = json.loads(said(result))
    found = attribute(llama.lm, PROMPT, "a", "t", raw=True, keep_universal=True)
    graph = find_edges(llama.lm, found, select=Selection("top_k", 60), n_targets=8)
    assert answer["edges"] == json.loads(json.dumps(graph.data(5)))["edges"]
    assert answer["n_edges"] == len(graph.edges) > 5
    assert answer["hubs"] == [asdict(hub) for hub in graph.hubs[:10]]
    assert answer["bottleneck"] == [[hub.layer, hub.neuron] for hub in graph.bottleneck]
    assert answer["flow"] == [[*ends, weight] for ends, weight in graph.layer_flow.items()]
    assert (answer["metric"], answer["target"], answer["counterfactual"]) == (graph.metric, "a", "t")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("attribute", {"prompt": "", "target": "a"}, "prompt is empty"),
        ("attribute", {"prompt": PROMPT, "target": ""}, "empty"),
        ("attribute", {"prompt": PROMPT, "target": "a", "counterfactual": "a"}, "same token"),
        ("attribute", {"prompt": "a" * (MAX_PROMPT + 1), "target": "a"}, "8,001 characters"),
        ("attribute", {"prompt": "a " * MAX_TOKENS, "target": "a"}, f"longer than the {MAX_TOKENS} tokens"),
        ("attribute", {"prompt": PROMPT, "target": "a", "neurons": 0}, "neurons is 0"),
        ("attribute", {"prompt": PROMPT, "target": "a", "neurons": MOST_NEURONS + 1}, "neurons is 1001"),
        ("attribute", {"prompt": PROMPT, "target": "a", "metric": "odd"}, "'odd'"),
        ("attribute", {"prompt": PROMPT, "target": "a", "attention": "odd"}, "'odd'"),
        ("attribute", {"prompt": PROMPT, "target": "a", "specific": True, "keep_universal": True}, "specific leaves"),
        ("attribute", {"prompt": PROMPT, "target": "a", "model": "no-such-model"}, "not on offer"),
        ("edges", {"prompt": PROMPT, "target": "a", "targets": 0}, "targets is 0"),
        ("edges", {"prompt": PROMPT, "target": "a", "count": 1001}, "count 1001"),
    ],
)
def test_a_mistake_is_one_clear_line(
    url: str, client: Client, name: str, arguments: dict[str, Any], words: str
) -> None:
    assert words in refusal(client, name, **arguments)
    result = as_agent(url, name, arguments)
    assert result.isError and words in said(result) and "\n" not in said(result)


def test_what_takes_too_long_is_stopped(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "MAX_SECONDS", 0.0)
    assert "was stopped; ask for less" in refusal(client, "attribute", **ASKED)
