"""Cards: what they say, that what they tell people to run works, and that nobody's words become more than words."""

import ast
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from checks import Run
from hub_server import FakeHub, check_metadata
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from PIL import Image
from tiny import REFERENCE, ablating, clamping, make_circuit, make_tiny, make_vector

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import is_generated, parameter_rows, render_card, render_pack_card
from neurosteer.artifacts.features import Feature, FeatureContext
from neurosteer.artifacts.plots import separation_plot
from neurosteer.artifacts.provenance import Provenance, Receipt
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import save
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.hub import push
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.models.reference import ModelReference
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Session

PROMPT = "Tell me about your day."
SOURCE = Provenance(
    created="2026-11-22T10:00:00+00:00",
    version="0.1.0",
    examples="reviews",
    examples_sha256="ab" * 32,
    n_positive=300,
    n_negative=200,
    n_cut=3,
    framing="answer",
    tokens="mean",
    layer_choice="best among layers 0-3 (AUC 0.91)",
    separation={0: 0.5, 1: 0.91},
)


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def front(card: str) -> dict[str, Any]:
    found = re.match(r"\A---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def body(card: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)


def reference_of(lm: LanguageModel, folder: Path) -> ModelReference:
    return replace(lm.reference, name=str(folder))


# --- what a card tells people to run ---------------------------------------------------------------------------------

WITHOUT_NEUROSTEER = """
import contextlib, io, json, sys
sys.modules["neurosteer"] = None  # importing it fails
texts = {}
for name, source in json.load(sys.stdin).items():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), {"__name__": name})
    texts[name] = printed.getvalue().removesuffix("\\n")
print(json.dumps(texts))
"""


def held_above(threshold: float, vector: SteeringVector) -> SteeringVector:
    """With a threshold that the feature is often below."""
    return replace(
        vector,
        encoders={layer: replace(encoder, threshold=threshold) for layer, encoder in vector.encoders.items()},
    )


def steered_artifacts(model: ModelReference) -> dict[str, Artifact]:
    return {
        "add": make_vector((1, 2), seed=1, name="add", model=model),
        "ablate": ablating((0, 2), seed=2, name="ablate", model=model),
        "clamp": held_above(8.0, clamping((1,), seed=3, name="clamp", model=model, centred=True)),
        "scale": make_circuit(seed=4, name="scale", model=model, calibration=Calibration(-6.0)),
        "shift": make_circuit(seed=5, name="shift", model=model, operation="shift", calibration=Calibration(6.0)),
    }


def written(session: Session, *uses: tuple[Artifact, float]) -> str:
    return session.generate(PROMPT, Recipe.of(*uses), sampling=Sampling(greedy=True), max_new_tokens=60)[0].text


@pytest.mark.slow
def test_the_plain_transformers_snippet_steers_as_we_do_without_neurosteer(
    hub: FakeHub, tmp_path: Path, model_folder: Path
) -> None:
    gpt2 = make_tiny("gpt2", chat=False)
    gpt2.model.save_pretrained(tmp_path / "gpt2")
    gpt2.lm.tokenizer.save_pretrained(tmp_path / "gpt2")
    snippets, expected = {}, {}
    for folder in (model_folder, tmp_path / "gpt2"):
        lm = load_model(folder, device="cpu", dtype="float32")
        session = Session(lm)
        made = steered_artifacts(reference_of(lm, folder))
        kept = made if folder == model_folder else {key: made[key] for key in ("add", "shift")}
        repo = f"alice/{folder.name}"
        push(list(kept.values()), repo)
        plain = written(session)
        for name, artifact in kept.items():
            for strength in (1.0, -0.7):
                card = hub.repos[repo].head.files[f"{name}/README.md"].data.decode()
                snippet = (
                    blocks(card, "python")[1]
                    .replace("STRENGTH = ", "STRENGTH = ")
                    .replace(", 1.0\n", f", {strength}\n", 1)
                )
                key = f"{folder.name} {name} {strength}"
                snippets[key] = snippet
                recipe = Recipe.of((artifact, strength))
                expected[key] = session.generate(PROMPT, recipe, sampling=Sampling(greedy=True), max_new_tokens=60)[
                    0
                ].text
                assert expected[key] != plain, key
    environment = {**os.environ, "PYTHONPATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_NEUROSTEER], input=json.dumps(snippets), capture_output=True, text=True,
        cwd=tmp_path, env=environment, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == expected


def test_the_snippet_of_an_artifact_that_is_not_published_reads_its_folder(tmp_path: Path) -> None:
    (snippet,) = [one for one in blocks(render_card(make_vector(name="mood")), "python") if "import torch" in one]
    assert 'open("./mood/config.json"' in snippet and 'load_file("./mood/weights.safetensors")' in snippet
    assert "hf_hub_download" not in snippet


def test_the_python_of_a_card_runs(
    hub: FakeHub,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = load_model(model_folder, device="cpu", dtype="float32")
    artifact = make_vector((1, 2), name="mood", model=reference_of(lm, model_folder))
    save(artifact, tmp_path / "mood")
    push(artifact, "alice/mood")
    push([artifact], "alice/pack")
    cards = [
        render_card(artifact),
        hub.repos["alice/mood"].head.files["README.md"].data.decode(),
        hub.repos["alice/pack"].head.files["README.md"].data.decode(),
    ]
    for card in cards:
        exec(compile(blocks(card, "python")[0], "card", "exec"), {})
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"-?[01] ", line)]


def test_the_command_of_a_card_runs(hub: FakeHub, model_folder: Path, run: Run) -> None:
    lm = load_model(model_folder, device="cpu", dtype="float32")
    push(make_vector((1, 2), name="mood", model=reference_of(lm, model_folder)), "alice/mood")
    (command,) = blocks(hub.repos["alice/mood"].head.files["README.md"].data.decode(), "bash")
    program, *arguments = shlex.split(command)
    ran = run(*arguments, "--max-new-tokens", 4)
    assert program == "neurosteer" and ran.code == 0, ran.err


@pytest.mark.parametrize("artifact", steered_artifacts(REFERENCE).values(), ids=lambda one: one.operation)
@pytest.mark.parametrize("repo", [None, "alice/mood", "alice/pack/mood"])
def test_every_snippet_is_python_of_sane_length(artifact: Artifact, repo: str | None) -> None:
    first, plain = blocks(render_card(artifact, repo=repo), "python")
    assert len(first.splitlines()) <= 10
    ast.parse(first)
    ast.parse(plain)
    assert max(map(len, plain.splitlines())) <= 120


# --- what a card says ------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_searches_by() -> None:
    card = render_card(make_vector(name="mood", description="Nice."), repo="alice/mood", licence="mit")
    assert front(card) == {
        "license": "mit",
        "base_model": "tiny/any",
        "base_model_relation": "adapter",
        "library_name": "neurosteer",
        "pipeline_tag": "text-generation",
        "tags": ["neurosteer", "steering-vector"],
        "neurosteer": {
            "artifacts": [
                {
                    "name": "mood",
                    "kind": "steering-vector",
                    "method": "caa",
                    "description": "Nice.",
                    "base_model": "tiny/any",
                    "shape": "4x32x64",
                }
            ]
        },
    }
    assert check_metadata(card) == ([], [])
    assert ModelCard(card).data.to_dict()["library_name"] == "neurosteer"


@pytest.mark.parametrize("pack", [False, True])
def test_a_licence_of_ones_own_has_the_name_and_the_link_that_the_hub_wants(pack: bool) -> None:
    vector = make_vector(name="mood")
    card = render_pack_card([vector], repo="a/b", licence="other") if pack else render_card(vector, licence="other")
    data = front(card)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "see-the-card", "README.md")
    assert "license_name" not in front(render_card(vector, licence="mit"))


def test_a_pack_names_all_its_models_and_kinds() -> None:
    other = replace(REFERENCE, name="other/model")
    card = render_pack_card([make_vector(name="a"), make_circuit(name="b", model=other)], repo="alice/pack")
    data = front(card)
    assert data["base_model"] == ["other/model", "tiny/any"]
    assert data["tags"] == ["neurosteer", "neuron-circuit", "steering-vector"]
    assert [one["name"] for one in data["neurosteer"]["artifacts"]] == ["a", "b"]
    assert "license" not in data


@pytest.mark.parametrize(
    "name", ["my-model", "folder with spaces", "/home/me/model", "a/b/c", "../x", "evil\nlicense: x"]
)
def test_a_model_that_is_not_on_the_hub_is_no_base_model_there(name: str) -> None:
    card = render_card(make_vector(model=replace(REFERENCE, name=name)), repo="alice/mood")
    assert "base_model" not in front(card)
    assert check_metadata(card) == ([], [])
    assert "](https://huggingface.co" not in card


def test_a_card_tells_where_an_artifact_comes_from() -> None:
    vector = make_vector(
        name="mood", provenance=SOURCE, parameters={"rank": "write"}, model=replace(REFERENCE, revision="r1")
    )
    card = render_card(vector)
    for fact in (
        "300 positive and 200 negative texts, 3 of them cut", "ab" * 32, "best among layers 0-3", "0.1.0", "reviews",
        "answer, tokens mean", "4 layers, d_model 32, d_mlp 64", "`0123456789abcdef`", "`r1`", "rank write",
        "strength 1 adds a push of 0.3", "not calibrated", "Limits and misuse", "Not yet measured",
    ):  # fmt: skip
        assert fact in card, fact
    plain = render_card(make_vector(name="sum", provenance=Provenance(parents=("one", "two"))))
    assert "Examples" not in plain and "`one`, `two`" in plain


RELP: dict[str, Any] = {
    "metric": "difference", "raw": True, "seed_response": "", "prompts": ["a | b", "x" * 90, "c", "d"],
    "targets": [{"id": 3, "text": " Paris", "given": " Paris", "n_tokens": 1}] * 4,
    "counterfactuals": [{"id": 4, "text": "\n"}, None, None, None], "metrics": [2.5, -1.25, 0.0, 0.0],
    "select": ["top_k", 200], "keep_universal": False, "universal": [[1, 2], [3, 4]], "super_weights": [[0, 5]],
}  # fmt: skip


def test_a_circuit_of_answers_names_them_and_counts_what_is_long() -> None:
    circuit = make_circuit(method="relp", parameters=RELP)
    assert parameter_rows(circuit) == [
        ("Made for", "'a | b' → ' Paris' rather than '\\n' (+2.5 logits)"),
        ("Made for", f"'…{'x' * 80}' → ' Paris' (-1.25 logits)"),
        ("Made for", "'c' → ' Paris' (+0 logits)"),
        ("Made for", "… 4 prompts in all"),
        ("Universal neurons", "2, and 1 super weights: left out"),
        ("Parameters", "metric difference; raw true; select top_k 200"),
    ]
    assert "| Universal neurons | 2, and 1 super weights: left out |" in render_card(circuit)
    kept = replace(circuit, parameters={**RELP, "keep_universal": True})
    assert ("Universal neurons", "2, and 1 super weights: counted too") in parameter_rows(kept)


@pytest.mark.parametrize("key", ["prompts", "targets", "counterfactuals", "metrics", "universal", "super_weights"])
@pytest.mark.parametrize("value", [None, 3, "text", {}, [], [None], [{"text": {"a": 1}}], [[3]] * 9])
def test_parameters_of_somebody_else_are_shown_whatever_they_are(key: str, value: Any) -> None:
    rows = parameter_rows(make_circuit(method="relp", parameters={**RELP, key: value}))
    assert rows and all(text.isprintable() for row in rows for text in row)


def test_features_are_listed_without_the_builders_texts() -> None:
    context = FeatureContext("my secret", " diary", " says", 3.0)
    feature = Feature(1, 7, 0.5, 1.0, (0.2, 0.1), (1.0, 1.0), promoted=(" good", "`|`"), contexts=(context,))
    card = render_card(make_vector(features=(feature,)))
    assert "| 1 | 7 | +0.5 | 20.00% / 10.00% | `good` `ˋ¦ˋ` |" in card
    assert "secret" not in card and "diary" not in card


def test_receipts_become_a_table_and_results_in_the_hubs_terms() -> None:
    receipt = Receipt(
        {
            "dataset": {"type": "reviews", "name": "Reviews"},
            "metrics": [{"type": "accuracy", "name": "Judged positive", "value": 0.94}],
            "table": {"title": "Effect", "columns": ["Strength", "Positive"], "rows": [[-1, 0.0912345], [1, "94 | %"]]},
        }
    )
    card = render_card(make_vector(name="mood", receipts=(receipt,)))
    assert "| Strength | Positive |\n|---|---|\n| -1 | 0.09123 |\n| 1 | 94 \\| % |" in card
    assert "Not yet measured" not in card
    (result,) = ModelCard(card).data.eval_results  # type: ignore[attr-defined]
    assert (result.metric_value, result.metric_name, result.dataset_name) == (0.94, "Judged positive", "Reviews")
    assert check_metadata(card) == ([], [])


def test_results_keep_their_datasets_apart_and_none_is_called_unnamed() -> None:
    metrics = [{"type": "share", "name": "Share", "value": 0.5}]
    data = [
        {"metrics": metrics, "dataset": {"type": "prompts", "name": "16 prompts"}},
        {"metrics": metrics, "dataset": {"type": "prompts", "name": "32 prompts"}},
        {"metrics": metrics, "dataset": {"type": "prompts"}},
        {"metrics": metrics},
        {"metrics": metrics, "dataset": {"type": "", "name": None}},
    ]
    vector = make_vector(name="mood", receipts=tuple(map(Receipt, data)))
    pack = [vector, make_circuit(name="few", receipts=(Receipt(data[0]),))]
    for card, names in ((render_card(vector), ["mood"]), (render_pack_card(pack, repo="a/b"), ["mood", "few"])):
        index = front(card)["model-index"]
        assert [one["name"] for one in index] == names and "unnamed" not in card
        datasets = [result["dataset"]["name"] for result in index[0]["results"]]
        assert datasets == ["16 prompts", "32 prompts", "prompts"]
        assert check_metadata(card) == ([], [])


def test_cards_published_in_an_earlier_form_are_still_known_as_ours_until_somebody_edits_them() -> None:
    for card in sorted((Path(__file__).parent.parent / "vectors").glob("*/README.md")):
        text = card.read_text(encoding="utf-8")
        assert is_generated(text), card
        assert not is_generated(text.replace("## Limits", "## My limits")), card
    body = "---\nlibrary_name: neurosteer\n---\n\n# old\n"  # whatever its form is
    digest = hashlib.sha256(body.encode()).hexdigest()
    mark = f"<!-- Written by NeuroSteer; what you change above is kept. SHA-256: {digest} -->\n"
    assert is_generated(body + mark) and not is_generated(body + "mine\n" + mark)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"table": 3, "metrics": "x"},
        {"table": {"columns": []}, "metrics": [None, {"type": 3, "value": 1}, {"type": "a", "value": "b"}]},
        {"table": {"columns": "ab", "rows": [[1]]}, "dataset": [1]},
        {"table": {"columns": ["a", "b"], "rows": [[1, 2, 3], "x", [None], {"a": 1}]}},
        {"metrics": [{"type": "a", "value": 1}, {"type": "a\n---\nb", "value": 2}]},
        {"table": {"columns": [{"a": 1}], "rows": None}, "dataset": {"name": None, "type": {"a": 1}}},
    ],
)  # fmt: skip
def test_receipts_of_any_form_do_no_harm(data: dict[str, Any]) -> None:
    card = render_card(make_vector(receipts=(Receipt(data),)))
    front(card)
    for table in re.findall(r"(?:^\|.*\|\n)+", card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_a_card_that_was_not_edited_is_told_from_one_that_was() -> None:
    card = render_card(make_vector())
    assert (
        is_generated(card)
        and is_generated(card.rstrip("\n"))
        and is_generated(render_pack_card([make_vector()], repo="a/b"))
    )
    assert not is_generated(card.replace("Limits", "limits"))
    assert not is_generated(card + "\nMore.")
    assert not is_generated("# By hand") and not is_generated("")


# --- other people's words --------------------------------------------------------------------------------------------

EVIL = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/track.png)",
    "https://evil.example www.evil.example <https://evil.example>",
    "a\n---\nlicense: evil\ntags: [evil]\n---\n# Evil",
    "- item\n# heading\n> quote\n```\ncode\n```",
    "| a | b |\n|---|---|\n| c | d |",
    "{{ 7 * 7 }} {% for x in y %}",
    "&lt;b&gt; &#106;avascript:",
    "*a* _b_ `c` ~~d~~ $e$ \\",
    "1. one",
    "---",
    "===",
    "+ plus",
    "[x]: https://evil.example",
    "[^1]: note",
    "<!-- hidden",
    '"; import os; os.system("evil") #',
    "'''\n\"\"\"\n$(evil) `evil`",
    "\u202eevil\u2028\u0085\x1b[31m",
)


def tokens_of(markdown: str) -> list[Token]:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    found = reader.parse(markdown)
    return [inner for token in found for inner in [token, *(token.children or [])]]


def shape_of(markdown: str) -> list[str]:
    """What the text is made of, its words aside."""
    return [token.type for token in tokens_of(markdown) if token.type not in ("text", "softbreak", "text_special")]


def assert_only_our_markdown(card: str, harmless: str) -> None:
    assert front(card).keys() == front(harmless).keys()
    assert shape_of(body(card)) == shape_of(body(harmless))
    tokens = tokens_of(body(card))
    targets = {
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens
        if token.type in ("link_open", "image")
    }
    assert not [
        target for target in targets if not target.startswith(("https://huggingface.co/", "separation.png", "mood/"))
    ]
    comments = [token.content for token in tokens if token.type in ("html_block", "html_inline")]
    assert len(comments) == 1 and comments[0].startswith("<!-- Written by NeuroSteer")


def worded(text: str) -> SteeringVector:
    """A vector with `text` wherever words of others may stand."""
    feature = Feature(1, 7, 0.5, 1.0, (0.2, 0.1), (1.0, 1.0), promoted=(text[:400], "b"))
    receipt = Receipt(
        {
            "table": {"title": text, "columns": [text, "b"], "rows": [[text, 1]]},
            "metrics": [{"type": text, "name": text, "value": 1}],
            "dataset": {"type": text, "name": text},
        }
    )
    source = replace(
        SOURCE, examples=text, layer_choice=text, framing=text, tokens=text, created=text, version=text, parents=(text,)
    )
    model = replace(REFERENCE, name=text[:300], revision=text[:300], fingerprint=text[:100])
    return make_vector(
        name="mood", description=text, method=text[:100], parameters={text: text}, provenance=source,
        receipts=(receipt,), features=(feature,), model=model,
    )  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_words_of_others_stay_words(text: str) -> None:
    evil, harmless = worded(text), worded("harmless words")
    assert_only_our_markdown(
        render_card(evil, plots=("separation.png",)), render_card(harmless, plots=("separation.png",))
    )
    assert_only_our_markdown(render_pack_card([evil], repo="a/p"), render_pack_card([harmless], repo="a/p"))
    card = render_card(evil, repo="alice/mood")
    for snippet in blocks(card, "python"):
        ast.parse(snippet)
        assert "os.system" not in [
            ast.unparse(node.func) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)
        ]
    for command in blocks(card, "bash"):
        assert len(shlex.split(command)) == 7
    assert "\x1b" not in card and "\u202e" not in card and "\u2028" not in card
    assert front(card)["tags"] == ["neurosteer", "steering-vector"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab `*_[]()<>#|~&!@$:/.-+=\\\n{}%'\"1)w"), min_size=1, max_size=40))
def test_whatever_the_words_are_they_stay_words(text: str) -> None:
    if not text.split():
        text = "words"
    evil, harmless = worded(text), worded("harmless words")
    assert_only_our_markdown(render_card(evil), render_card(harmless))


@pytest.mark.parametrize("text", [one for one in EVIL if "\n" not in one and one.isprintable()])
def test_a_description_reads_as_it_was_written(text: str) -> None:
    card = body(render_card(make_vector(name="mood", description=text)))
    shown = "".join(token.content for token in tokens_of(card) if token.type in ("text", "text_special"))
    assert " ".join(text.split()) in shown


# --- plots -----------------------------------------------------------------------------------------------------------


def test_a_plot_is_a_png_and_the_same_for_the_same_figures() -> None:
    separation = {layer: 0.5 + layer / 60 for layer in range(30)}
    first = separation_plot(separation)
    assert first == separation_plot(dict(reversed(separation.items())))
    picture = Image.open(io.BytesIO(first))
    assert picture.format == "PNG" and picture.size == (840, 360)
    candidates = [{"label": "layers 1 to 3 together", "effect": 0.2}, {"label": "layer 1 $x_", "effect": 0.1}]
    assert separation_plot(separation, candidates) not in (first, separation_plot(separation, candidates[:1]))
    assert separation_plot(separation, [{"label": 3}, {"effect": "much"}, "no"]) == first  # type: ignore[list-item]
    assert first != separation_plot({**separation, 3: 0.99})
    assert b"matplotlib" not in first.lower() and b"Date" not in first


def test_a_card_shows_the_plot_that_lies_beside_it_and_no_other() -> None:
    assert "](separation.png)" in render_card(make_vector(), plots=("separation.png",))
    assert "separation.png" not in render_card(make_vector())
