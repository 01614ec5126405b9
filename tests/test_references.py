"""What people write for an artifact: folders, released names, repos on the Hub and their addresses."""

import logging
import shutil
from pathlib import Path

import pytest
from checks import refused
from hub_server import FakeHub
from tiny import make_vector

from neurosteer.artifacts.recipes import Use
from neurosteer.artifacts.storage import load, save
from neurosteer.errors import ArtifactError, UsageError
from neurosteer.examples.files import vectors_folder
from neurosteer.hub import parse_reference, pull, push
from neurosteer.hub.references import parse_use, resolve


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("user/mood", "user/mood"),
        ("user/pack/anger@v1", "user/pack/anger@v1"),
        ("https://huggingface.co/user/mood", "user/mood"),
        ("https://huggingface.co/user/mood/", "user/mood"),
        ("HTTPS://HuggingFace.co/user/mood?not-for-all-audiences=true#use", "user/mood"),
        ("http://hf.co/user/mood", "user/mood"),
        ("huggingface.co/user/mood", "user/mood"),
        ("hf.co/user/mood/tree/v2", "user/mood@v2"),
        ("https://huggingface.co/user/mood/tree/main", "user/mood"),
        ("https://huggingface.co/user/pack/tree/main/anger", "user/pack/anger"),
        ("https://huggingface.co/user/pack/tree/v1/anger", "user/pack/anger@v1"),
        ("https://huggingface.co/user/pack/blob/main/anger/config.json", "user/pack/anger"),
        ("https://huggingface.co/user/mood/blob/main/README.md", "user/mood"),
        ("https://huggingface.co/user/mood/tree/refs%2Fpr%2F1", "user/mood@refs/pr/1"),
        ("hf://user/mood", "user/mood"),
        ("hf://models/user/pack@v1/anger", "user/pack/anger@v1"),
        ("models/user/mood", "user/mood"),
    ],
)
def test_the_hubs_own_ways_to_write_a_repo_are_understood(text: str, plain: str) -> None:
    assert str(parse_reference(text)) == plain


@pytest.mark.parametrize(
    "text",
    [
        "mood",
        "models/mood",
        "hf://mood",
        "datasets/user/mood",
        "spaces/user/mood",
        "hf://datasets/user/mood",
        "https://huggingface.co/datasets/user/mood",
        "https://huggingface.co/user",
        "https://huggingface.co/user/mood/discussions/1",
        "https://huggingface.co.evil.example/user/mood",
        "https://evil.example/user/mood",
        "https://evil.example/huggingface.co/user/mood",
        "ftp://huggingface.co/user/mood",
        "file:///etc/passwd",
        "https://huggingface.co/user/mood/tree/../../x",
        "hf://user/mood@../../x",
        "https://huggingface.co/user/mood/tree/main/a/b/c",
        "https://[/user/mood",
    ],
)
def test_what_is_no_models_repo_on_the_hub_is_refused(text: str) -> None:
    refused(lambda: parse_reference(text), UsageError, "names nothing on the Hub", text[:20])


def test_artifacts_are_pulled_and_pushed_by_address(hub: FakeHub, tmp_path: Path) -> None:
    made = make_vector(name="mood")
    push(made, f"{hub.url}/alice/mood")
    for text in (f"{hub.url}/alice/mood", "hf://alice/mood", f"{hub.url}/alice/mood/tree/main", "models/alice/mood"):
        assert pull(text).name == resolve(text).name == "mood"
        used = [parse_use(text), parse_use(f"{text}:-1.5")]
        assert [use.strength for use in used] == [1.0, -1.5]
        assert all(isinstance(use, Use) and use.artifact.name == "mood" for use in used)


@pytest.mark.parametrize(("typo", "meant"), [("sentimant", "sentiment"), ("formalty", "formality")])
def test_a_typo_of_a_released_name_gets_a_suggestion(typo: str, meant: str) -> None:
    assert f"Did you mean {meant}" in refused(lambda: parse_use(f"{typo}:1"), ArtifactError, typo)
    assert "Did you mean" not in refused(lambda: resolve("nothing-like-them-at-all"), ArtifactError, "nothing-like")


def test_a_folder_here_that_hides_a_released_artifact_or_a_repo_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("vectors/formality", "sentiment", "user/mood", "mine"):
        save(make_vector(name="other"), place)

    def said(reference: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "neurosteer"):
            assert resolve(reference).name == "other"
        return "\n".join(record.getMessage() for record in caplog.records)

    for name in ("formality", "sentiment"):
        (line,) = said(name).splitlines()
        assert line.startswith(f"Warning: {name} is the folder") and str(vectors_folder() / name) in line
    (line,) = said("user/mood").splitlines()
    assert "not a repo on the Hub" in line and "./user/mood" in line
    for plain in ("mine", "./user/mood", "./sentiment", str(tmp_path / "user" / "mood")):
        assert said(plain) == ""


def test_the_released_artifact_itself_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.chdir(vectors_folder().parent)
    assert resolve("sentiment").name == load(vectors_folder() / "sentiment").name
    shutil.copytree(vectors_folder() / "sentiment", tmp_path / "copy")
    assert not caplog.records
