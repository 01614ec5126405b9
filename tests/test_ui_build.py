"""The Build tab without a browser, with a tiny random model."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import FakeHub
from pages import (
    mix_of,
    source,
    texts,
    told,
    visitor,
)
from safetensors.torch import save_file
from tiny import D_MODEL, Tiny, make_vector

from neurosteer.artifacts.storage import unpack
from neurosteer.errors import ModelError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets
from neurosteer.examples.reading import parse_examples
from neurosteer.methods import METHODS
from neurosteer.progress import check_cancelled, silent
from neurosteer.ui import settings as building_settings
from neurosteer.ui import work
from neurosteer.ui.mixer import MOST
from neurosteer.ui.settings import OF_SOME_METHODS, Settings, build_options, check_sae
from neurosteer.ui.source import Source, read_source
from neurosteer.ui.tabs.build_handlers import BuildHandlers
from neurosteer.ui.tabs.describe import DescribeHandlers

BUTTONS = {"start", "cancel", "error", "note"}
"""All that changes where nothing was built."""


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


def test_columns_can_be_pointed_at_and_the_preview_says_what_was_read(building: BuildHandlers, tmp_path: Path) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("review;stars;asked\n很好;5;p\n喜欢它;5;q\n不喜欢;1;p\n很糟糕;1;q\n很好;1;p\n", encoding="gbk")
    given = source("file", file=str(table))
    assert "found columns" in building.preview(visitor(), given)
    told = given._replace(text_column="Review", label_column=" stars ", positive_label="5")
    assert "is both positive (row 2) and negative (row 6)" in building.preview(visitor(), told)
    html = building.preview(visitor(), told._replace(drop_conflicts=True, prompt_column="asked"))
    assert "1 different positive text(s)" in html
    html = building.preview(visitor(), told._replace(positive_label="1", drop_conflicts=True))
    assert "1 different negative text(s)" in html
    table.write_text("review;stars;asked\n很好;5;p\n喜欢它;5;q\n不喜欢;1;p\n很糟糕;1;q\n", encoding="gbk")
    html = building.preview(visitor(), told._replace(prompt_column="asked"))
    assert "很好" in html and "GBK" in html and "They are read as answers to 2 prompts." in html


def test_strangers_fetch_no_data_set_and_trusted_visitors_do(
    building: BuildHandlers, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = b"prompt,chosen,rejected\np,a,b\nq,c,d\n"
    hub.put("datasets/alice/secret", {"train.csv": rows}, private=True)
    given = source("dataset", dataset="alice/secret")
    assert "ns-hint" in building.preview(visitor(), source("dataset"))
    assert "hf://datasets/alice/secret" in building.preview(visitor(), given)
    asked = len(hub.requests)
    monkeypatch.setenv("SPACE_ID", "us/page")
    for each in (given, given._replace(dataset="hf://datasets/alice/secret/train.csv")):
        assert "on a page of one&#x27;s own only" in building.preview(visitor(), each)
        assert "own only" in building.build(visitor(), told, each, Settings(), mix_of({}, []))["error"]
    assert len(hub.requests) == asked
    table = source("bundled", bundled="hf://datasets/alice/secret")
    assert "There is no ready-made set" in building.preview(visitor(), table) and len(hub.requests) == asked


@pytest.mark.parametrize(
    "given", [source("bundled"), source("file"), source("files", positive_file="x"), source("paste", positive_text="a")]
)
def test_a_source_without_content_yet_is_asked_for(given: Source, building: BuildHandlers) -> None:
    assert read_source(given) is None
    assert "ns-hint" in building.preview(visitor(), given)


def test_a_broken_file_is_one_line_with_its_own_name(building: BuildHandlers, tmp_path: Path) -> None:
    broken = tmp_path / "my <b>texts.csv"
    broken.write_text("text,label\nhappy,positive\nsad,maybe\n")
    html = building.preview(visitor(), source("file", file=str(broken)))
    assert html.startswith("<p class='ns-error'") and "maybe" in html and "<b>" not in html
    assert html.count("<p") == 1


def test_building_puts_the_result_on_the_shelf_and_chooses_it(building: BuildHandlers) -> None:
    given = source("paste", positive_text="\n".join(texts("happy")), negative_text="\n".join(texts("sad")))
    settings = Settings(name="my mood", layers="1")
    found = building.build(visitor(), told, given, settings, mix_of({}, []))
    assert found["start"]["interactive"] and not found["cancel"]["interactive"]
    assert (found["error"], found["note"], found["latest"]) == ("", "", "my-mood")
    shelf, download = found["shelf"], found["download"]
    assert list(shelf) == found["standing"] == found["chosen"]["value"] == ["my-mood"]
    assert "my-mood" in found["result"] and found["features"] == "" and download["visible"]
    assert found["try_it"]["visible"] and not found["empty"]["visible"]
    assert [found[f"row_{number}"]["visible"] for number in range(1, MOST + 1)] == [True, False, False, False]
    assert unpack(Path(download["value"])).layers == [1]
    assert found["plot"]["visible"] == (len(shelf["my-mood"].provenance.separation) > 1)


def test_what_goes_wrong_while_building_is_one_line_and_changes_nothing_else(building: BuildHandlers) -> None:
    given = source("bundled", bundled="sentiment")
    settings = Settings(layers="99")
    found = building.build(visitor(), told, given, settings, mix_of({}, []))
    assert found["start"]["interactive"] and "99" in found["error"] and "layers 0 to" in found["error"]
    assert found["note"] == "" and set(found) == BUTTONS
    found = building.build(visitor(), told, source("file"), settings, mix_of({}, []))
    assert "no examples yet" in found["error"]


def test_a_cancelled_build_says_so_and_changes_nothing_else(building: BuildHandlers) -> None:
    building.begin(visitor())
    building.stop(visitor())
    given = source("bundled", bundled="sentiment")
    found = building.build(visitor(), told, given, Settings(), mix_of({}, []))
    assert found["error"] == "" and "Cancelled" in found["note"] and set(found) == BUTTONS


def test_a_build_that_takes_too_long_is_stopped_and_said(
    building: BuildHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neurosteer.building import build as module

    begun: list[float] = []

    def read(*given: Any, **options: Any) -> Any:
        begun.append(time.monotonic())
        while time.monotonic() - begun[-1] < 20:
            check_cancelled(given[-1].cancel, "Reading")
            time.sleep(0.02)

    monkeypatch.setattr(module, "read_plan", read)
    monkeypatch.setattr(work, "MAX_SECONDS", 0.3)
    found = building.build(visitor(), told, source("bundled", bundled="sentiment"), Settings(), mix_of({}, []))
    assert begun and time.monotonic() - begun[0] < 5
    assert "took over 0.3 s and was stopped; give fewer texts" in found["error"] and set(found) == BUTTONS


def test_a_ready_made_set_is_one_of_those_there_are_and_never_a_path(building: BuildHandlers, tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("text,label\nthe secret,positive\nsad,negative\n")
    said = building.preview(visitor(), source("bundled", bundled=str(secret)))
    assert "There is no ready-made set" in said and "the secret" not in said


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
    found = building.build(visitor(), told, given, settings, mix_of({}, []))
    features = found["features"]
    assert found["error"] == "" and "a steering vector at layer 1" in found["result"]
    assert "Its 5 features" in features and "<mark>" in features
    assert len(found["shelf"]["mood"].features) == 5 and features in found["about"]
    plain = settings._replace(contexts=False)
    features = building.build(visitor(), told, given, plain, mix_of({}, []))["features"]
    assert "Its 5 features" in features and "<mark>" not in features


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(method="sae"), "No SAE is shipped for tiny/llama"),
        (Settings(method="sae", sae="no-such-thing"), "There is no SAE &#x27;no-such-thing&#x27;"),
        (
            Settings(method="sae", sae="{folder}", top_k="0.5"),
            "top_k is 0.5; it must be a whole number",
        ),
        (Settings(method="sae", sae="{folder}", min_output_score="much"), "min_output_score is &#x27;much&#x27;"),
    ],
)
def test_what_is_wrong_with_the_options_of_sae_is_one_line(
    building: BuildHandlers, sae_folder: Path, settings: Settings, words: str
) -> None:
    settings = settings._replace(sae=settings.sae.format(folder=sae_folder))
    given = source("bundled", bundled="sentiment")
    found = building.build(visitor(), told, given, settings, mix_of({}, []))
    assert words in found["error"] and found["error"].count("<p") == 1 and set(found) == BUTTONS


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
    widths: dict[str, int] = {}
    monkeypatch.setattr(building_settings, "sae_width", lambda release, identifier: widths[identifier])
    widths["blocks.8.hook_resid_pre"] = 24_576
    for name in ("embedded", "embedded/14", "gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        check_sae(name, gpt2)


def test_a_space_fetches_no_sae_that_would_fill_its_memory(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2 = replace(llama.lm, name="GPT-2-small")
    most = building_settings.MOST_SAE_BYTES // (8 * D_MODEL)
    width = [most + 1]
    monkeypatch.setattr(building_settings, "sae_width", lambda release, identifier: width[0])
    check_sae("gpt2-small-res-jb/wide", gpt2)  # on a machine of one's own
    monkeypatch.setenv("SPACE_ID", "us/page")
    with pytest.raises(UsageError, match=r"'gpt2-small-res-jb/wide' takes 1\.1 GB and this page loads up to 1\.1 GB"):
        check_sae("gpt2-small-res-jb/wide", gpt2)
    width[0] = most
    check_sae("gpt2-small-res-jb/wide", gpt2)


def test_an_sae_s_width_is_known_from_its_description_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", lambda release, identifier: {"d_sae": 24_576})
    assert building_settings.sae_width("gpt2-small-res-jb", "blocks.8.hook_resid_pre") == 24_576
    monkeypatch.setattr(loaders, "load_sae_config_from_huggingface", lambda release, identifier: {})
    with pytest.raises(ModelError, match="could not be found out"):
        building_settings.sae_width("gpt2-small-res-jb", "odd")


def test_the_options_follow_the_method(building: BuildHandlers) -> None:
    for method, entry in METHODS.items():
        shown = building.show_parameters(method)
        visible = {name for name, update in shown.items() if update["visible"]}
        assert visible == set(OF_SOME_METHODS) & set(entry.defaults) and set(shown) == set(OF_SOME_METHODS)
        assert shown["rank"]["value"] == shown["top_k"]["value"] == ""  # they mean something else now
    ranks = {
        method: [value for _, value in building.show_parameters(method)["rank"]["choices"]]
        for method in ("cna", "sae", "caa")
    }
    assert ranks == {
        "cna": ["", "difference", "dprime", "write"], "sae": ["", "rate", "dprime", "probe"], "caa": [""]
    }  # fmt: skip
    assert building.show_parameters("sae")["top_k"]["label"] == "Features (top_k)"
    assert building.show_parameters("cna")["top_k"]["label"] == "Neurons (top_k)"


def test_every_method_is_offered_with_its_explanation(building: BuildHandlers) -> None:
    offered = {value: label for label, value in building.choices()["method"]["choices"]}
    assert list(offered) == list(METHODS)
    assert all(METHODS[name].explanation in label for name, label in offered.items())


def test_try_it_goes_to_the_steer_tab_with_the_newest_alone(building: BuildHandlers, mood: Any) -> None:
    shelf = {"old": mood, "new": mood}
    found = building.try_it("new", mix_of(shelf, ["old"], 2.0))
    assert found["tabs"]["selected"] == "steer" and found["standing"] == found["chosen"]["value"] == ["new"]


# --- described -------------------------------------------------------------------------------------------------------


def test_a_description_becomes_a_table_that_is_built_from_as_it_stands(building: BuildHandlers) -> None:
    describing = DescribeHandlers(building.models, building.jobs)
    who = visitor()
    describing.begin(who)
    found = describing.write(who, told, "Write like a pirate.", "Write plainly.", None)
    rows = found["answers"]["value"]
    assert found["error"] == "" and len(rows) > 10 and all(len(row) == 3 for row in rows)
    rows[0][1] = "Ahoy!"
    examples = read_source(source("described", answers=[*rows, ["", None, ""]]))
    assert examples is not None and examples.positive[0] == "Ahoy!" and examples.positive_prompts[0] == rows[0][0]
    saved = parse_examples(Path(found["download"]["value"]).read_bytes(), filename="answers.csv")
    assert saved.positive[1:] == examples.positive[1:]
    built = building.build(
        who, told, source("described", answers=rows), Settings(layers="2", calibrate=False), mix_of({}, [])
    )
    assert built["error"] == "" and "answers-caa" in built["latest"] and "worth" not in built["result"]
    kept = describing.keep(who, rows)["download"]["value"]  # what was edited is what is downloaded
    assert parse_examples(Path(kept).read_bytes(), filename="answers.csv").positive == examples.positive


@pytest.mark.slow
def test_what_a_description_is_worth_is_told_with_the_build(building: BuildHandlers) -> None:
    who = visitor()
    rows = [
        [f"{word} {number}?", f"happy {word} {number}", f"red {number}"] for number in range(6) for word in ("a", "b")
    ]
    asked = (source("described", answers=rows), Settings(layers="2"), mix_of({}, []))
    found = building.build(who, told, *asked, ("Be happy.", "Be red."))
    assert found["error"] == "" and "for other prompts, as described: " in found["result"]
    elsewhere = building.build(who, told, *asked, ())
    assert elsewhere["error"] == "" and "were not written on this page" in elsewhere["result"]
    odd = building.build(who, told, *asked, ("x" * 400_000, "y"))
    assert odd["error"] == "" and "could not be measured" in odd["result"] and "400,000 characters" in odd["result"]


def test_a_judge_of_a_description_is_trained_on_no_more_than_others(building: BuildHandlers) -> None:
    many = ContrastSet(tuple(f"{n} {'a' * 20_000}" for n in range(51)), tuple(f"{n} {'b' * 20_000}" for n in range(51)))
    said = building.worth(make_vector(), many, ("Be happy.", "Be red."), silent, threading.Event())
    assert len(said) == 1 and "2,040," in said[0] and "for a judge" in said[0]


@pytest.mark.parametrize(
    ("instruct", "against", "said"),
    [
        ("", "x", "Fill in both lines"),
        ("x", " ", "Fill in both lines"),
        ("x", "X", "the same"),
        ("x" * 2000, "y", "2,000"),
    ],
)
def test_a_description_that_says_nothing_is_one_line(
    building: BuildHandlers, instruct: str, against: str, said: str
) -> None:
    describing = DescribeHandlers(building.models, building.jobs)
    describing.begin(visitor())
    found = describing.write(visitor(), told, instruct, against, None)
    assert set(found) == BUTTONS and said in found["error"]


def test_an_answer_that_was_emptied_is_refused_with_its_row(building: BuildHandlers) -> None:
    rows = [["a?", "yes", "no"], ["b?", "", "no way"], ["c?", "sure", "nope"]]
    assert "row 3" in building.preview(visitor(), source("described", answers=rows))
    assert read_source(source("described", answers=None)) is None
    assert read_source(source("described", answers=[["", "", ""]])) is None
