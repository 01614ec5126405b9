"""The Build tab without a browser, with a tiny random model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import (
    SKIP,
    mix_values,
    source,
    texts,
    told,
    visitor,
)
from safetensors.torch import save_file
from tiny import D_MODEL, Tiny

from neurosteer.artifacts.storage import unpack
from neurosteer.errors import UsageError
from neurosteer.examples.files import bundled_sets
from neurosteer.methods import METHODS
from neurosteer.ui.mixer import MOST
from neurosteer.ui.source import Source, read_source
from neurosteer.ui.tabs.build import BuildHandlers, Settings, build_options, check_sae


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SAE for the tiny Llama's block 1, in sae-lens's format."""
    folder, generator = tmp_path_factory.mktemp("sae"), torch.Generator().manual_seed(0)
    weights = torch.randn(D_MODEL, 64, generator=generator) / D_MODEL**0.5
    tensors = {
        "W_enc": weights,
        "W_dec": weights.T.contiguous(),
        "b_enc": torch.zeros(64),
        "b_dec": torch.zeros(D_MODEL),
    }
    save_file({**tensors, "threshold": torch.full((64,), 0.5)}, folder / "sae_weights.safetensors")
    metadata = {"model_name": "tiny/llama", "hook_name": "blocks.1.hook_resid_post"}
    config = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": 64, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_examples_are_read_from_every_source(tmp_path: Path) -> None:
    table, yes, no = tmp_path / "mood.csv", tmp_path / "yes.txt", tmp_path / "no.txt"
    table.write_text("text,label\nhappy,positive\nglad,positive\nsad,negative\nlow,negative\n")
    yes.write_text("happy\nglad\n")
    no.write_text("sad\nlow\n")
    given = [
        source("file", file=str(table)),
        source("files", positive_file=str(yes), negative_file=str(no)),
        source("paste", positive_text="happy\nglad", negative_text="sad\nlow"),
    ]
    for each in given:
        examples = read_source(each)
        assert examples is not None and (examples.positive, examples.negative) == (("happy", "glad"), ("sad", "low"))
    for name in bundled_sets():
        examples = read_source(source("bundled", bundled=name))
        assert examples is not None and examples.name == name


@pytest.mark.parametrize(
    "given", [source("bundled"), source("file"), source("files", positive_file="x"), source("paste", positive_text="a")]
)
def test_a_source_without_content_yet_is_asked_for(given: Source, building: BuildHandlers) -> None:
    assert read_source(given) is None
    assert "ns-hint" in building.preview(visitor(), *given)


def test_a_broken_file_is_one_line_with_its_own_name(building: BuildHandlers, tmp_path: Path) -> None:
    broken = tmp_path / "my <b>texts.csv"
    broken.write_text("text,label\nhappy,positive\nsad,maybe\n")
    html = building.preview(visitor(), *source("file", file=str(broken)))
    assert html.startswith("<p class='ns-error'") and "maybe" in html and "<b>" not in html
    assert html.count("<p") == 1


def test_building_puts_the_result_on_the_shelf_and_chooses_it(building: BuildHandlers) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="my mood", layers="1")
    start, cancel, error, note, result, features, plot, download, try_it, latest, *mixed = building.build(
        visitor(), told, *given, *settings, *mix_values({}, [])
    )
    shelf, shown, empty, chosen, *rows = mixed
    assert (start["interactive"], cancel["interactive"], error, note) == (True, False, "", "")
    assert latest == "my-mood" and list(shelf) == shown == chosen["value"] == ["my-mood"]
    assert "my-mood" in result and features == "" and download["visible"] and try_it["visible"]
    assert not empty["visible"] and [row["visible"] for row in rows[:MOST]] == [True, False, False, False]
    assert unpack(Path(download["value"])).layers == [1]
    assert plot["visible"] == (len(shelf["my-mood"].provenance.separation) > 1)


def test_what_goes_wrong_while_building_is_one_line_and_changes_nothing_else(building: BuildHandlers) -> None:
    given = source("bundled", bundled="sentiment")
    settings = Settings(layers="99")
    start, _, error, note, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert start["interactive"] and "99" in error and "layers 0 to" in error and note == ""
    assert rest == [SKIP] * len(rest)
    _, _, error, *_ = building.build(visitor(), told, *source("file"), *settings, *mix_values({}, []))
    assert "no examples yet" in error


def test_a_cancelled_build_says_so_and_changes_nothing_else(building: BuildHandlers) -> None:
    building.begin(visitor())
    building.cancel(visitor())
    given = source("bundled", bundled="sentiment")
    _, _, error, note, *rest = building.build(visitor(), told, *given, *Settings(), *mix_values({}, []))
    assert error == "" and "Cancelled" in note
    assert rest == [SKIP] * len(rest)


def own_options(settings: Settings) -> dict[str, Any]:
    """Without the two that are always passed on."""
    options = build_options(settings)
    assert options.pop("calibrate") is True and options.pop("hold_out") == 0.0
    return options


def test_only_what_was_set_and_what_the_method_takes_is_passed_on() -> None:
    given = Settings("n", "caa", " ", "", "", "write", "shift", "10")
    assert own_options(given) == {"method": "caa", "layers": "auto", "name": "n"}
    given = Settings("", "cna", "3", "raw", "last", "dprime", "", " 0.5")
    assert own_options(given) == {
        "method": "cna", "layers": "3", "framing": "raw", "tokens": "last", "rank": "dprime", "top_k": 0.5
    }  # fmt: skip


def test_the_options_of_sae_reach_it_and_no_other_method() -> None:
    own: dict[str, Any] = {
        "weight": "target",
        "sides": "positive",
        "sae": " embedded/14 ",
        "min_output_score": "0.01",
        "contexts": False,
    }
    assert own_options(Settings(method="sae", rank="probe", top_k="16", operation="shift", **own)) == {
        "method": "sae", "layers": "auto", "rank": "probe", "top_k": 16, "weight": "target", "sides": "positive",
        "sae": "embedded/14", "min_output_score": 0.01, "contexts": 0,
    }  # fmt: skip
    assert own_options(Settings(method="sae")) == {"method": "sae", "layers": "auto"}
    assert own_options(Settings(method="caa", **own)) == {"method": "caa", "layers": "auto"}


def test_building_with_sae_shows_what_it_is_made_of(building: BuildHandlers, sae_folder: Path) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="mood", method="sae", top_k="5", sae=str(sae_folder))
    _, _, error, _, result, features, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert error == "" and "a steering vector at layer 1" in result
    assert "Its 5 features" in features and "<mark>" in features
    shelf, about = rest[4], rest[-1]
    assert len(shelf["mood"].features) == 5 and features in about
    _, _, _, _, _, features, *_ = building.build(
        visitor(), told, *given, *settings._replace(contexts=False), *mix_values({}, [])
    )
    assert "Its 5 features" in features and "<mark>" not in features


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(method="sae"), "No SAE is shipped for tiny/llama"),
        (Settings(method="sae", sae="no-such-thing"), "There is no SAE &#x27;no-such-thing&#x27;"),
        (Settings(method="sae", sae="{folder}", top_k="0.5"), "top_k is 0.5; with sae it must be a count of features"),
        (Settings(method="sae", sae="{folder}", min_output_score="much"), "min_output_score is &#x27;much&#x27;"),
    ],
)
def test_what_is_wrong_with_the_options_of_sae_is_one_line(
    building: BuildHandlers, sae_folder: Path, settings: Settings, words: str
) -> None:
    settings = settings._replace(sae=settings.sae.format(folder=sae_folder))
    given = source("bundled", bundled="sentiment")
    _, _, error, _, *rest = building.build(visitor(), told, *given, *settings, *mix_values({}, []))
    assert words in error and error.count("<p") == 1 and rest == [SKIP] * len(rest)


def test_a_space_takes_only_the_saes_of_its_model(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = replace(llama.lm, name="GPT-2-small")
    for name in ("/etc", "somebody/theirs/1", "gemma-scope-9b-pt-res/layer_9/width_1m/average_l0_14"):
        monkeypatch.delenv("SPACE_ID", raising=False)
        check_sae(name, llama.lm)
        monkeypatch.setenv("SPACE_ID", "us/page")
        with pytest.raises(
            UsageError, match=r"not offered on this page; for GPT-2-small there are: gpt2-small-res-jb/…"
        ):
            check_sae(name, gpt2)
    for name in ("embedded", "embedded/14", "gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        check_sae(name, gpt2)


def test_the_options_follow_the_method(building: BuildHandlers) -> None:
    names = ("rank", "operation", "top_k", "weight", "sides", "sae", "min_output_score", "contexts")
    for method, entry in METHODS.items():
        shown = dict(zip(names, building.show_parameters(method), strict=True))
        assert {name for name, update in shown.items() if update["visible"]} == set(names) & set(entry.defaults)
        assert shown["rank"]["value"] == shown["top_k"]["value"] == ""  # they mean something else now
    ranks = {
        method: [value for _, value in building.show_parameters(method)[0]["choices"]]
        for method in ("cna", "sae", "caa")
    }
    assert ranks == {
        "cna": ["", "difference", "dprime", "write"], "sae": ["", "rate", "dprime", "probe"], "caa": [""]
    }  # fmt: skip
    assert building.show_parameters("sae")[2]["label"] == "Features (top_k)"
    assert building.show_parameters("cna")[2]["label"] == "Neurons (top_k)"


def test_every_method_is_offered_with_its_explanation(building: BuildHandlers) -> None:
    offered = {value: label for label, value in building.choices()[0]["choices"]}
    assert list(offered) == list(METHODS)
    assert all(METHODS[name].explanation in label for name, label in offered.items())


def test_try_it_goes_to_the_steer_tab_with_the_newest_alone(building: BuildHandlers, mood: Any) -> None:
    shelf = {"old": mood, "new": mood}
    tabs, _, shown, _, chosen, *_ = building.try_it("new", *mix_values(shelf, ["old"], 2.0))
    assert tabs["selected"] == "steer" and shown == chosen["value"] == ["new"]
