"""The page for programs, over real HTTP: with `gradio_client`, and with the MCP client of the package `mcp`."""

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent, Tool
from pages import ENDPOINTS, Ready, serving, slow_steps, texts
from tiny import Tiny, make_circuit, make_vector, tiny

from neurosteer.artifacts.recipes import UNSTEERED, Recipe, Use
from neurosteer.artifacts.storage import artifact_data, load, pack, unpack
from neurosteer.errors import ModelError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.methods import METHODS
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Session
from neurosteer.ui import shelf as shelves
from neurosteer.ui import work
from neurosteer.ui.api import endpoints
from neurosteer.ui.limits import MAX_NEW_TOKENS, MAX_PROMPT
from neurosteer.ui.loading import Models

POSITIVE, NEGATIVE = list(texts("happy")), list(texts("sad"))


def connected(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(Ready(Session(tiny("llama").lm))) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return connected(url)


@pytest.fixture
def tools(url: str) -> "Callable[[str, dict[str, Any]], CallToolResult]":
    """Calls a tool as an agent does."""

    def call(name: str, arguments: dict[str, Any]) -> CallToolResult:
        return asyncio.run(with_mcp(url, lambda session: session.call_tool(name, arguments)))

    return call


async def with_mcp(url: str, ask: Callable[[ClientSession], Any]) -> Any:
    async with (
        streamable_http_client(f"{url}gradio_api/mcp/") as (reading, writing, _),
        ClientSession(reading, writing) as session,
    ):
        await session.initialize()
        return await ask(session)


def said(result: CallToolResult) -> str:
    (content,) = result.content
    assert isinstance(content, TextContent)
    return content.text


def as_text(artifact: Any) -> str:
    return base64.b64encode(pack(artifact)).decode()


def from_text(text: str) -> Any:
    return unpack(base64.b64decode(text))


def written(lm: LanguageModel, recipe: Recipe, *, tokens: int, prompt: str = "the cat") -> str:
    """What the library writes."""
    return Session(lm).generate(prompt, recipe, max_new_tokens=tokens, sampling=Sampling(greedy=True))[0].text


def refusal(client: Client, name: str, **arguments: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(Exception) as error:
        client.predict(**arguments, api_name=f"/{name}")
    return checked_line(str(error.value))


def checked_line(line: str) -> str:
    assert line and "\n" not in line and len(line) < 500 and "Traceback" not in line and "github" not in line.lower()
    return line


# --- what is there ---------------------------------------------------------------------------------------------------


def test_the_endpoints_are_open_and_no_other(client: Client) -> None:
    info: Any = client.view_api(return_format="dict", print_info=False)
    assert list(info["named_endpoints"]) == [f"/{name}" for name in ENDPOINTS]
    assert info["unnamed_endpoints"] == {}


def test_the_tools_say_what_they_do_what_they_take_and_what_they_return(url: str) -> None:
    found: list[Tool] = asyncio.run(with_mcp(url, lambda session: session.list_tools())).tools
    assert [tool.name for tool in found] == ENDPOINTS
    for tool in found:
        assert tool.description and "Returns: " in tool.description and "  " not in tool.description
        for name, described in tool.inputSchema["properties"].items():
            assert described["description"].endswith((".", "them.")), name  # whole, not cut at the end of a line
            assert described["type"] in ("string", "array", "boolean", "integer", "number"), name
    schemas = {tool.name: tool.inputSchema for tool in found}
    assert schemas["steer"]["required"] == ["prompt", "use"]
    assert schemas["build"]["required"] == ["positive", "negative"]
    assert schemas["steer"]["properties"]["use"]["items"] == {"type": "string"}
    assert '["sentiment:1"]' in schemas["steer"]["properties"]["use"]["description"]
    assert "required" not in schemas["list"] and schemas["pull"]["required"] == ["reference"]


def test_the_limits_and_choices_that_are_told_are_those_that_hold(url: str) -> None:
    found: list[Tool] = asyncio.run(with_mcp(url, lambda session: session.list_tools())).tools
    steer, build = (tool.inputSchema["properties"] for tool in found[:2])
    assert f"{MAX_PROMPT:,} characters" in steer["prompt"]["description"]
    assert f"1 to {MAX_NEW_TOKENS}" in steer["max_new_tokens"]["description"]
    assert all(name in build["method"]["description"] for name in METHODS)


def test_what_the_server_has_is_listed(client: Client) -> None:
    offered = client.predict(api_name="/list")
    assert [one["name"] for one in offered["models"] if one["default"]] == ["SmolLM2-135M-Instruct"]
    assert [one["name"] for one in offered["methods"]] == list(METHODS)
    assert {one["name"] for one in offered["artifacts"]} == set(shelves.released())
    assert all("strength 1" in one["strength"] and one["layers"] for one in offered["artifacts"])
    assert client.predict(model="GPT-2-small", api_name="/list")["artifacts"] == []


# --- building and steering -------------------------------------------------------------------------------------------


def test_a_program_builds_from_answers_to_prompts(client: Client) -> None:
    prompts = [f"question {n}" for n in range(24)]
    asked: dict[str, Any] = {"positive_prompts": prompts, "negative_prompts": prompts}
    built = client.predict(POSITIVE, NEGATIVE, layers="1", calibrate=False, **asked, api_name="/build")
    wanted = ContrastSet(
        tuple(POSITIVE), tuple(NEGATIVE), positive_prompts=tuple(prompts), negative_prompts=tuple(prompts)
    )
    source = from_text(built["artifact"]).provenance
    assert (source.examples_sha256, source.n_prompts) == (wanted.sha256, 24)
    with pytest.raises(Exception, match="negative_prompts has 1 for 24 texts"):
        client.predict(POSITIVE, NEGATIVE, positive_prompts=prompts, negative_prompts=["one"], api_name="/build")


def test_a_program_steers_with_what_it_built(client: Client, llama: Tiny) -> None:
    built = client.predict(POSITIVE, NEGATIVE, layers="1", name="mood", api_name="/build")
    vector = from_text(built["artifact"])
    assert (vector.name, vector.layers, vector.method) == ("mood", [1], "caa")
    assert vector.provenance.examples_sha256 == ContrastSet(tuple(POSITIVE), tuple(NEGATIVE)).sha256
    assert vector.provenance.n_prompts == 0
    assert built["examples"] == {"positive": 24, "negative": 24, "cut": 0, "blank": 0, "duplicate": 0}
    assert built["model"] == "tiny/llama" and set(built["separation"]) == {"1"} and built["warnings"] == []

    texts_ = client.predict("the cat", [built["artifact"] + ":3"], compare=True, greedy=True, max_new_tokens=12,
                            api_name="/steer")  # fmt: skip
    for side, recipe in (("steered", Recipe.of((vector, 3.0))), ("unsteered", UNSTEERED)):
        assert texts_[side] == {"text": written(llama.lm, recipe, tokens=12), "tokens": 12, "finish": "length"}
    assert texts_["steered"]["text"] != texts_["unsteered"]["text"]
    assert texts_["use"] == [{"name": "mood", "strength": 3.0}]
    assert texts_["model"] == "tiny/llama" and texts_["warnings"] == []


def test_an_agent_steers_with_what_it_built(tools: Callable[..., CallToolResult], llama: Tiny) -> None:
    built = tools("build", {"positive": POSITIVE, "negative": NEGATIVE, "method": "cna", "layers": "0-2", "top_k": 9})
    assert not built.isError
    data = json.loads(said(built))
    circuit = from_text(data["artifact"])
    assert data["kind"] == "neuron-circuit" and circuit.size == 9
    asked = {"prompt": "the cat", "use": [f"{data['artifact']}:-2"], "greedy": True, "max_new_tokens": 12}
    steered = tools("steer", asked)
    assert not steered.isError
    answer = json.loads(said(steered))
    assert answer["steered"]["text"] == written(llama.lm, Recipe.of((circuit, -2.0)), tokens=12)
    assert "unsteered" not in answer


def test_several_artifacts_are_mixed_and_a_strength_left_out_is_1(client: Client, llama: Tiny) -> None:
    vector, circuit = make_vector(seed=3), make_circuit(seed=4)
    steered = client.predict(
        "the cat", [as_text(vector), as_text(circuit) + ":0.5"], greedy=True, max_new_tokens=12, api_name="/steer"
    )
    recipe = Recipe((Use(vector, 1.0), Use(circuit, 0.5)))
    assert steered["steered"]["text"] == written(llama.lm, recipe, tokens=12)
    assert [one["strength"] for one in steered["use"]] == [1.0, 0.5]
    assert len(steered["warnings"]) == 2 and "other weights" in steered["warnings"][0]


def test_a_recipe_in_words_is_steered_by(client: Client, llama: Tiny, tmp_path: Path) -> None:
    vector = make_vector(seed=3)
    plain = client.predict("the cat", [f"{as_text(vector)}:2"], greedy=True, max_new_tokens=12, api_name="/steer")
    assert plain["steered"]["text"] == written(llama.lm, Recipe.of((vector, 2.0)), tokens=12)
    for words, said in (
        ("sentiment + formality @prompt + x", "nothing behind it"),
        ("/etc/passwd", "user/repo"),
        ('"../x":1', "user/repo"),
        ("sentiment + sentiment + sentiment + sentiment + sentiment", "use names 5 artifacts"),
    ):
        assert said in refusal(client, "steer", prompt="a", use=[words]), words
    assert "all tokens" in refusal(client, "evaluate", use=["sentiment @prompt"], judge="words:sun,moon")


def test_sampling_is_as_asked_for(client: Client, llama: Tiny) -> None:
    vector = make_vector(seed=3)
    for sampling in (Sampling(seed=5), Sampling(temperature=1.5, top_p=0.5, seed=6)):
        steered = client.predict(
            "the cat", [as_text(vector)], seed=sampling.seed, temperature=sampling.temperature, top_p=sampling.top_p,
            raw=True, max_new_tokens=12, api_name="/steer",
        )  # fmt: skip
        alone = Session(llama.lm).generate("the cat", Recipe.of(vector), max_new_tokens=12, sampling=sampling, raw=True)
        assert steered["steered"]["text"] == alone[0].text


def test_a_released_artifact_is_pulled_and_inspected_by_its_name(client: Client, tmp_path: Path) -> None:
    pulled = client.predict("sentiment", api_name="/pull")
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(pulled["artifact"]))) as archive:
        archive.extractall(tmp_path)
    released = shelves.released()["sentiment"]
    assert artifact_data(load(tmp_path / "sentiment")) == artifact_data(released)
    assert pulled["strength"].startswith("strength 1 adds")
    for reference, marked in (("sentiment", False), (pulled["artifact"], True)):
        found = client.predict(reference, api_name="/inspect")
        assert ("untrusted" in found) == marked  # as text it may come from anybody
        found.pop("untrusted", None)
        assert found == json.loads(json.dumps(artifact_data(released)))


@pytest.mark.embedded
def test_the_embedded_model_is_steered_over_http(embedded_lm: LanguageModel) -> None:
    holder = Ready(Session(embedded_lm))
    with serving(holder) as address:
        client = connected(address)
        happy = [f"What a lovely {thing}, I enjoyed every minute of it!" for thing in texts("film")]
        awful = [f"What a dreadful {thing}, I hated every minute of it." for thing in texts("film")]
        built = client.predict(happy, awful, name="mood", layers="14", calibrate=False, api_name="/build")
        found = client.predict(
            "Describe a street at noon.", [built["artifact"] + ":1", "gratitude:0.5"], compare=True, greedy=True,
            max_new_tokens=16, api_name="/steer",
        )  # fmt: skip
    assert found["steered"]["text"] != found["unsteered"]["text"]
    alone = written(embedded_lm, UNSTEERED, tokens=16, prompt="Describe a street at noon.")
    assert found["unsteered"]["text"] == alone


# --- what goes wrong -------------------------------------------------------------------------------------------------

VECTOR = as_text(make_vector())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("steer", {"prompt": " ", "use": ["sentiment"]}, "made on 'HuggingFaceTB/SmolLM2-135M-Instruct'"),
        ("steer", {"prompt": "", "use": [VECTOR]}, "prompt is empty"),
        ("steer", {"prompt": "a" * (MAX_PROMPT + 1), "use": [VECTOR]}, "8,001 characters; this page takes 8,000"),
        ("steer", {"prompt": "a", "use": []}, "use names 0 artifacts; give 1 to 4"),
        ("steer", {"prompt": "a", "use": [VECTOR] * 5}, "use names 5 artifacts; give 1 to 4"),
        ("steer", {"prompt": "a", "use": ["mood:1"]}, "no released artifact 'mood'; there are civility, formality"),
        ("steer", {"prompt": "a", "use": ["sentiment:much"]}, "character 11 («much»)"),
        ("steer", {"prompt": "a", "use": ["sentiment:nan"]}, "there should be a strength"),
        ("steer", {"prompt": "a", "use": ["UEsDnot base64!"]}, "is not base64"),
        ("steer", {"prompt": "a", "use": ["UEsDBBQAAAAIAHeP"]}, "not a zip file"),
        ("steer", {"prompt": "a", "use": [VECTOR], "max_new_tokens": 513}, "at most 512"),
        ("steer", {"prompt": "a", "use": [VECTOR], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ("steer", {"prompt": "a", "use": [VECTOR], "temperature": 0}, "temperature is 0"),
        ("steer", {"prompt": "a", "use": [VECTOR], "model": "no-such-model"}, "'no-such-model' is not on offer"),
        ("build", {"positive": ["a"], "negative": ["b"]}, "1 different positive text(s) where at least 2 are needed"),
        ("build", {"positive": ["a", "b"], "negative": ["a", "c"]}, "both positive (row 1) and negative (row 1)"),
        ("build", {"positive": POSITIVE, "negative": NEGATIVE, "method": "magic"}, "no method 'magic'"),
        ("build", {"positive": POSITIVE, "negative": NEGATIVE, "layers": "99"}, "layers 0 to 3"),
        ("build", {"positive": POSITIVE, "negative": NEGATIVE, "method": "cna", "rank": "best"}, "'best'"),
        ("build", {"positive": POSITIVE, "negative": NEGATIVE, "framing": "odd"}, "framing is 'odd'"),
        ("list", {"model": "no-such-model"}, "'no-such-model' is not on offer"),
        ("inspect", {"reference": ""}, "no released artifact ''"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_for_programs_and_agents(
    client: Client, tools: Callable[..., CallToolResult], name: str, arguments: dict[str, Any], words: str
) -> None:
    assert words in refusal(client, name, **arguments)
    result = tools(name, arguments)
    assert result.isError and words in checked_line(said(result))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("steer", {"prompt": 5, "use": [VECTOR]}, "prompt is 5; it must be text."),
        ("steer", {"prompt": "a", "use": "sentiment:1"}, "use is 'sentiment:1'; it must be a list of texts."),
        ("steer", {"prompt": "a", "use": [1]}, "use is [1]; it must be a list of texts."),
        ("steer", {"prompt": "a", "use": [VECTOR], "greedy": "no"}, "greedy is 'no'; it must be true or false."),
        ("steer", {"prompt": "a", "use": [VECTOR], "seed": 1.5}, "seed is 1.5; it must be a whole number."),
        (
            "steer",
            {"prompt": "a", "use": [VECTOR], "max_new_tokens": True},
            "max_new_tokens is True; it must be a whole",
        ),
        ("build", {"positive": "good", "negative": ["b"]}, "positive is 'good'; it must be a list of texts."),
        ("pull", {"reference": None}, "reference is None; it must be text."),
    ],
)
def test_a_value_of_another_type_is_one_clear_line(
    client: Client, tools: Callable[..., CallToolResult], name: str, arguments: dict[str, Any], words: str
) -> None:
    assert words in refusal(client, name, **arguments)
    result = tools(name, arguments)
    assert result.isError and "\n" not in said(result)  # the MCP server checks types by itself


@pytest.mark.parametrize(
    "reference",
    ["/etc/passwd", "../secrets", "vectors/sentiment/..", "./vectors/sentiment", "~", "~/x", "C:\\x", "file:///etc",
     "sentiment/", "..", "."],
)  # fmt: skip
def test_no_reference_reaches_a_file_of_the_server(client: Client, reference: str) -> None:
    for name in ("inspect", "pull"):
        line = refusal(client, name, reference=reference)
        assert "names nothing on the Hub" in line or "no released artifact" in line
        assert str(Path.cwd()) not in line and str(Path.home()) not in line


def test_a_model_of_this_machine_is_known_by_its_name_alone(model_folder: Path) -> None:
    models = Models(str(model_folder))
    assert models.default == models.names[0] == "tiny-llama"
    with pytest.raises(ModelError) as error:
        models.holder("another")
    assert "tiny-llama" in str(error.value) and str(model_folder.parent) not in str(error.value)
    assert models.holder("tiny-llama").wait().lm.name == "tiny-llama"


@pytest.mark.parametrize(("space", "token"), [("us/page", False), (None, None)])
def test_a_space_never_lends_its_own_token(
    client: Client, monkeypatch: pytest.MonkeyPatch, space: str | None, token: object
) -> None:
    used = []

    def pull(reference: str, **options: object) -> Any:
        used.append((reference, options))
        return make_vector()

    monkeypatch.setattr("neurosteer.hub.pull", pull)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    answers = [client.predict("us/mood@main", api_name=f"/{name}") for name in ("pull", "inspect")]
    answers.append(client.predict("the cat", ["us/mood@main:2"], max_new_tokens=2, api_name="/steer"))
    assert used == [("us/mood@main", {"token": token})] * 3
    assert "hf_secret" not in json.dumps(answers)


def test_a_fault_of_ours_is_one_line_that_tells_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reference: str) -> None:
        raise KeyError("hf_secret")

    monkeypatch.setattr(endpoints, "_artifact", fail)
    line = refusal(client, "inspect", reference="sentiment")
    assert "Something went wrong on our side (KeyError)" in line and "secret" not in line


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return slow_steps(monkeypatch, 0.03)


def test_what_takes_too_long_is_stopped_and_what_was_written_is_kept(
    url: str, monkeypatch: pytest.MonkeyPatch, steps: list[float]
) -> None:
    monkeypatch.setattr(work, "MAX_SECONDS", 0.5)
    found = connected(url).predict("the cat", [VECTOR], max_new_tokens=200, api_name="/steer")
    assert found["steered"]["finish"] == "cancelled" and 1 <= found["steered"]["tokens"] < 30
    assert found["steered"]["tokens"] <= len(steps)


def test_a_program_that_dies_frees_its_place_within_five_seconds(url: str, steps: list[float]) -> None:
    code = (
        "import sys, time; from gradio_client import Client\n"
        "client = Client(sys.argv[1], verbose=False, analytics_enabled=False)\n"
        "client.submit('the cat', [sys.argv[2]], max_new_tokens=200, api_name='/steer'); time.sleep(60)"
    )
    program = subprocess.Popen([sys.executable, "-c", code, url, VECTOR])
    try:
        while not steps:
            assert program.poll() is None
            time.sleep(0.01)
    finally:
        program.kill()
        program.wait()
    left = time.monotonic()
    while time.monotonic() - steps[-1] < 1.0:  # no step for a second: nobody is being written for
        assert time.monotonic() - left < 6
        time.sleep(0.05)
    assert steps[-1] - left < 5 and len(steps) < 190


def test_calls_of_one_program_do_not_stop_one_another(client: Client, steps: list[float]) -> None:
    jobs = [client.submit("the cat", [VECTOR], max_new_tokens=10, seed=n, api_name="/steer") for n in range(3)]
    assert [job.result()["steered"]["tokens"] for job in jobs] == [10] * 3


def test_without_the_mcp_package_the_page_serves_all_but_the_tools(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with serving(Ready(Session(llama.lm))) as address:
        assert connected(address).predict("sentiment", api_name="/inspect")["name"] == "sentiment"
        assert httpx.get(f"{address}gradio_api/mcp/").status_code == 404
