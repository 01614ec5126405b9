"""Publishing, fetching and finding artifacts over HTTP: the real client against the server in `hub_server`."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from checks import Run, assert_one_clear_line, refused
from hub_server import FakeHub, File
from safetensors.torch import save
from tiny import REFERENCE, clamping, make_circuit, make_vector
from transformers import AutoConfig

import neurosteer
from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import is_generated
from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.storage import load
from neurosteer.artifacts.storage import save as save_artifact
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, HubError, HubUnreachable, MismatchError, UsageError
from neurosteer.hub import (
    Found,
    list_artifacts,
    parse_reference,
    pull,
    pull_folder,
    pull_into,
    push,
    read_card,
    search,
    whoami,
)
from neurosteer.hub.references import parse_use, resolve
from neurosteer.models.reference import ModelReference

SEPARATION = {0: 0.5, 1: 0.75, 2: 0.875}


def named(name: str, *, seed: int = 0, **changes: object) -> SteeringVector:
    return make_vector(name=name, seed=seed, **changes)  # type: ignore[arg-type]


def written(artifact: Artifact, folder: Path) -> dict[str, bytes]:
    """The bytes that `save` writes, the card aside: it tells where the artifact lies."""
    save_artifact(artifact, folder)
    return {name: (folder / name).read_bytes() for name in ("config.json", "weights.safetensors")}


def remote(hub: FakeHub, repo: str) -> dict[str, bytes]:
    return {path: file.data for path, file in hub.repos[repo].head.files.items() if path != ".gitattributes"}


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "artifact",
    [
        named("mood", description="A better mood.", provenance=Provenance(separation=SEPARATION)),
        clamping([1, 2], seed=3, name="held"),
        make_circuit(name="few", operation="shift"),
    ],
    ids=["vector", "clamp", "circuit"],
)
def test_what_is_pushed_is_found_and_pulled_with_the_same_bytes(
    hub: FakeHub, tmp_path: Path, artifact: Artifact
) -> None:
    pushed = push(artifact, f"alice/{artifact.name}")
    (found,) = search(artifact.name)
    back = pull(found.repo)
    here = written(artifact, tmp_path / "here")
    assert {path: data for path, data in remote(hub, found.repo).items() if path in here} == here
    assert written(back, tmp_path / "back") == here
    assert pushed.commit == hub.repos[found.repo].head.oid
    assert pushed.url == f"{hub.url}/alice/{artifact.name}"
    assert found.names == (artifact.name,) and found.kinds == (artifact.kind,)


def test_a_push_is_one_commit_with_a_card_and_a_plot_where_several_layers_were_compared(hub: FakeHub) -> None:
    plain = push(named("plain"), "alice/plain")
    plotted = push(named("plotted", provenance=Provenance(separation=SEPARATION)), "alice/plotted")
    assert plain.files == ("README.md", "config.json", "weights.safetensors")
    assert plotted.files == ("README.md", "config.json", "separation.png", "weights.safetensors")
    assert remote(hub, "alice/plotted")["separation.png"].startswith(b"\x89PNG")
    for repo in ("alice/plain", "alice/plotted"):
        before, pushed = hub.repos[repo].commits
        assert before.title == "initial commit" and pushed.title.startswith("Upload")


def test_pushing_again_replaces_the_artifact_and_drops_a_plot_it_no_longer_has(hub: FakeHub, tmp_path: Path) -> None:
    push(named("mood", provenance=Provenance(separation=SEPARATION)), "alice/mood")
    second = named("mood", seed=1)
    push(second, "alice/mood")
    assert sorted(remote(hub, "alice/mood")) == ["README.md", "config.json", "weights.safetensors"]
    assert written(pull("alice/mood"), tmp_path / "back") == written(second, tmp_path / "here")
    assert len(hub.repos["alice/mood"].commits) == 3


def test_pushing_what_is_there_already_makes_no_commit(hub: FakeHub) -> None:
    first = push(named("mood"), "alice/mood")
    assert push(named("mood"), "alice/mood").commit == first.commit
    assert len(hub.repos["alice/mood"].commits) == 2


def test_a_repo_without_a_user_is_ones_own_and_an_organisations_may_be_named(hub: FakeHub) -> None:
    assert push(named("mood"), "mood").repo == "alice/mood"
    assert push(named("mood"), "lab/mood").repo == "lab/mood"


def test_a_pack_of_five_goes_up_in_one_commit_and_each_comes_back(hub: FakeHub, tmp_path: Path) -> None:
    pack = [named(f"part-{number}", seed=number) for number in range(4)] + [make_circuit(name="last")]
    pushed = push(pack, "alice/pack")
    names = sorted(one.name for one in pack)
    assert len(hub.repos["alice/pack"].commits) == 2
    assert pushed.files == tuple(
        sorted(
            [
                "README.md",
                "config.json",
                *(f"{n}/{f}" for n in names for f in ("README.md", "config.json", "weights.safetensors")),
            ]
        )
    )
    assert list_artifacts("alice/pack") == names
    for one in pack:
        back = pull(f"alice/pack/{one.name}")
        assert written(back, tmp_path / "back" / one.name) == written(one, tmp_path / "here" / one.name)
    (found,) = search("pack")
    assert sorted(found.names) == names and found.kinds == ("steering-vector", "neuron-circuit")


def test_a_pack_has_an_index_by_which_the_hub_counts_its_downloads(hub: FakeHub) -> None:
    push([named("loud", seed=1), named("calm")], "alice/pack")
    index = json.loads(remote(hub, "alice/pack")["config.json"])
    assert (index["kind"], index["artifacts"]) == ("neurosteer-pack", ["calm", "loud"])
    pull("alice/pack/calm")
    pull("alice/pack/calm")  # from the cache
    (found,) = search("pack")
    assert found.downloads == 1
    push(named("sad", seed=2), "alice/pack")
    assert json.loads(remote(hub, "alice/pack")["config.json"])["artifacts"] == ["calm", "loud", "sad"]
    hub.fail("resolve", status=403, skip=3, times=100)  # the index comes last, and nothing needs it
    assert pull("alice/pack/loud").name == "loud"


def test_a_pack_of_earlier_days_without_an_index_is_read_and_gets_one(hub: FakeHub) -> None:
    push([named("calm"), named("loud", seed=1)], "alice/pack")
    del hub.repos["alice/pack"].head.files["config.json"]
    assert list_artifacts("alice/pack") == ["calm", "loud"] and pull("alice/pack/calm").name == "calm"
    push(named("sad", seed=2), "alice/pack")
    assert json.loads(remote(hub, "alice/pack")["config.json"])["artifacts"] == ["calm", "loud", "sad"]


def test_transformers_takes_no_config_of_ours_for_a_models(hub: FakeHub, tmp_path: Path) -> None:
    push([named("calm")], "alice/pack")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "config.json").write_bytes(remote(hub, "alice/pack")["config.json"])
    save_artifact(named("mood"), tmp_path / "mood")
    for folder in ("pack", "mood"):
        with pytest.raises(ValueError, match="model_type"):
            AutoConfig.from_pretrained(tmp_path / folder)


def test_several_repos_go_into_one_collection(hub: FakeHub) -> None:
    for name in ("calm", "loud", "calm"):
        pushed = push(named(name), f"alice/{name}", collection="Moods & more")
        (slug,) = hub.collections
        assert pushed.note == f"It is in the collection {hub.url}/collections/{slug}."
    assert slug.startswith("alice/moods-more-") and not hub.collections[slug]["private"]
    assert [one["id"] for one in hub.collections[slug]["items"]] == ["alice/calm", "alice/loud"]
    push(named("team"), "lab/team", collection="Moods & more")
    assert sorted(one.partition("/")[0] for one in hub.collections) == ["alice", "lab"]


@pytest.mark.parametrize("route", ["collections", "collection-item"])
@pytest.mark.parametrize("status", [403, 500])
def test_a_collection_that_fails_is_told_in_one_line_and_loses_nothing(
    hub: FakeHub, quick: list[float], route: str, status: int
) -> None:
    hub.fail(route, status=status, times=10)
    pushed = push(named("mood"), "alice/mood", collection="Moods")
    assert pushed.note.startswith("It is published, but in no collection:") and len(pushed.note.splitlines()) == 1
    assert pull("alice/mood").name == "mood"


def test_a_pack_pulled_without_a_name_lists_its_names(hub: FakeHub) -> None:
    push([named("calm"), named("loud", seed=1)], "alice/pack")
    refused(lambda: pull("alice/pack"), HubError, "a pack of 2: calm, loud", "alice/pack/calm")
    refused(lambda: pull("alice/pack/sad"), HubError, "calm, loud", "no 'sad'")
    push(named("one"), "alice/one")
    refused(lambda: pull("alice/one/calm"), HubError, "leave the name 'calm' out")
    assert list_artifacts("alice/one") == []


def test_a_pack_grows_and_its_card_names_all_that_is_in_it(hub: FakeHub) -> None:
    push([named("calm"), named("loud", seed=1)], "alice/pack")
    push(named("sad", seed=2), "alice/pack")
    push([named("calm", seed=3)], "alice/pack")
    assert list_artifacts("alice/pack") == ["calm", "loud", "sad"]
    card = read_card("alice/pack")
    assert all(f"[{name}]({name}/README.md)" in card for name in ("calm", "loud", "sad"))
    (found,) = search("pack")
    assert found.names == ("calm", "loud", "sad")


def test_a_repo_that_holds_something_else_is_not_overwritten(hub: FakeHub) -> None:
    model = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x", "README.md": b"# A model"}
    hub.put("alice/model", dict(model))
    refused(lambda: push(named("mood"), "alice/model"), HubError, "something else")
    refused(lambda: push([named("mood")], "alice/model"), HubError, "something else")
    push(named("one"), "alice/one")
    refused(lambda: push([named("mood")], "alice/one"), HubError, "cannot become a pack")
    assert remote(hub, "alice/model") == model


def test_other_files_in_a_repo_stay(hub: FakeHub) -> None:
    hub.put("alice/mood", {"NOTES.md": b"mine", "data/texts.csv": b"a,b"})
    push(named("mood"), "alice/mood")
    assert remote(hub, "alice/mood")["NOTES.md"] == b"mine"
    assert remote(hub, "alice/mood")["data/texts.csv"] == b"a,b"


def test_arguments_that_make_no_sense_are_refused_before_anything_is_sent(hub: FakeHub) -> None:
    refused(lambda: push([], "alice/pack"), UsageError, "0 artifacts")
    refused(lambda: push([named("a"), named("a", seed=1)], "alice/pack"), UsageError, "named 'a'")
    refused(lambda: push(named("a"), "alice/a", licence="My Licence!"), UsageError, "apache-2.0")
    refused(lambda: push("/no/such/folder", "alice/a"), ArtifactError, "no artifact folder")
    assert hub.requests == []
    refused(lambda: push(named("a"), "alice/pack/a"), UsageError, "user/repo")
    refused(lambda: push(named("a"), "alice/a@main"), UsageError, "user/repo")
    assert hub.routes() == ["whoami"] * 2 and hub.repos == {}


# --- revisions -------------------------------------------------------------------------------------------------------


def test_a_pinned_revision_stays_what_it_was(hub: FakeHub, tmp_path: Path) -> None:
    first, second = named("mood"), named("mood", seed=1)
    commit = push(first, "alice/mood").commit
    hub.repos["alice/mood"].tags["v1"] = commit
    push(second, "alice/mood")
    old = written(first, tmp_path / "first")
    assert written(pull(f"alice/mood@{commit}"), tmp_path / "by-commit") == old
    assert written(pull("alice/mood@v1"), tmp_path / "by-tag") == old
    assert written(pull("alice/mood"), tmp_path / "main") == written(second, tmp_path / "second")
    refused(lambda: pull("alice/mood@v2"), HubError, "no such revision", "alice/mood")


def test_a_commit_that_was_pulled_is_not_asked_for_again(hub: FakeHub) -> None:
    commit = push(named("mood"), "alice/mood").commit
    pull(f"alice/mood@{commit}")
    hub.requests.clear()
    pull(f"alice/mood@{commit}")
    assert hub.requests == []


@pytest.mark.parametrize(
    "text",
    ["mood", "alice/", "/alice/mood", "alice/mood/a/b", "alice/mood@", "alice/../x", "../alice/mood", "alice/mood/..",
     "alice/mood@../../x", "alice/mood@a//b", "alice/mood@/etc", "alice/mood@a/./b", "a b/c", "", "x" * 5000 + "/y",
     "alice\\mood", "alice/mo--od", "alice/mood@main\0", "älice/mood"],
)  # fmt: skip
def test_references_that_name_nothing_are_refused_without_asking(hub: FakeHub, text: str) -> None:
    refused(lambda: parse_reference(text), UsageError, "user/repo")
    refused(lambda: pull(text), UsageError, "user/repo")
    assert hub.requests == []


def test_references_are_read_part_by_part() -> None:
    reference = parse_reference("alice/pack.v2/mood--1@feature/new")
    assert (reference.repo, reference.name, reference.revision) == ("alice/pack.v2", "mood--1", "feature/new")
    assert str(reference) == "alice/pack.v2/mood--1@feature/new"


# --- who may read and write ------------------------------------------------------------------------------------------


def test_a_private_repo_is_there_for_its_owner_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(named("mood"), "alice/mood", private=True)
    assert hub.repos["alice/mood"].private
    assert pull("alice/mood").name == "mood"
    (found,) = search("mood")
    assert found.private
    assert search("mood", token="hf_bob") == search("mood", token=False) == []
    refused(lambda: pull("alice/mood", token="hf_bob"), HubError, "alice/mood", "your token", "ask its owner")
    refused(lambda: pull("alice/mood", token=False), HubError, "alice/mood", "hf auth login", "HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: read_card("alice/mood"), HubError, "hf auth login")


def test_what_one_user_pulled_is_not_given_to_another_of_the_same_process(hub: FakeHub, quick: list[float]) -> None:
    commit = push(named("mood"), "alice/mood", private=True).commit
    pull("alice/mood", token="hf_alice")
    for token in ("hf_bob", False):
        refused(lambda token=token: pull(f"alice/mood@{commit}", token=token), HubError, "alice/mood")
    hub.fail("info", status=503, times=10)
    refused(lambda: pull("alice/mood", token="hf_bob"), HubUnreachable)


def test_offline_what_is_in_the_cache_goes_to_nobody_who_comes_with_a_token_of_their_own(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = push(named("mood"), "alice/mood", private=True).commit
    pull("alice/mood")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for reference in ("alice/mood", f"alice/mood@{commit}"):
        for token in ("hf_bob", "hf_alice", False):
            refused(lambda one=reference, by=token: pull(one, token=by), HubUnreachable, "nobody can say", "alice/mood")
        assert pull(reference).name == "mood"


def test_a_gated_repo_says_where_to_ask_for_access(hub: FakeHub) -> None:
    push(named("mood"), "alice/mood")
    hub.repos["alice/mood"].gated = "manual"
    page = f"{hub.url}/alice/mood"
    pull("alice/mood")  # of the owner, and in the cache from now on
    refused(lambda: pull("alice/mood", token="hf_bob"), HubError, "gated", page)
    message = refused(lambda: pull("alice/mood", token=False), HubError, "gated", page, "hf auth login")
    assert "HF_TOKEN" in message
    hub.repos["alice/mood"].readers.add("bob")
    assert pull("alice/mood", token="hf_bob").name == "mood"
    assert [one.gated for one in search("mood")] == [True]


def test_a_private_push_never_goes_to_a_public_repo(hub: FakeHub) -> None:
    push(named("mood"), "alice/mood")
    refused(lambda: push(named("secret", seed=1), "alice/mood", private=True), HubError, "public already", "/settings")
    assert b"secret" not in remote(hub, "alice/mood")["config.json"]


def test_the_token_comes_from_the_argument_the_environment_or_the_stored_login(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert whoami() == "alice" and whoami("hf_bob") == "bob" and whoami(False) is None
    monkeypatch.delenv("HF_TOKEN")
    assert whoami() is None
    (tmp_path / "token").write_text("hf_bob")
    assert whoami() == "bob"
    refused(lambda: whoami("hf_nobody"), HubError, "token", "hf auth login")
    refused(lambda: whoami("hf with a space"), HubError, "characters")


def test_without_a_login_nothing_is_made(hub: FakeHub) -> None:
    refused(lambda: push(named("mood"), "alice/mood", token=False), HubError, "not logged in", "hf auth login")
    refused(lambda: push(named("mood"), "alice/mood", token="hf_nobody"), HubError, "refused the token")
    refused(lambda: push(named("mood"), "alice/mood", token="hf_carol"), HubError, "may only read", "/settings/tokens")
    refused(lambda: push(named("mood"), "bob/mood"), HubError, "may not create bob/mood", "/settings/tokens")
    push(named("mood"), "bob/mood", token="hf_bob")
    refused(lambda: push(named("mood", seed=1), "bob/mood"), HubError, "may not push to bob/mood")
    assert list(hub.repos) == ["bob/mood"]


# --- cards that somebody edited --------------------------------------------------------------------------------------


def edited(card: bytes) -> bytes:
    return card.replace(b"## Limits and misuse", b"## My own words\n\nKind regards.\n\n## Limits and misuse")


def test_a_card_edited_on_the_hub_is_kept_and_the_push_says_so(hub: FakeHub) -> None:
    first = push(named("mood"), "alice/mood")
    assert not first.card_kept and first.note == ""
    card = edited(remote(hub, "alice/mood")["README.md"])
    hub.put("alice/mood", {"README.md": card})
    pushed = push(named("mood", seed=1, description="Another."), "alice/mood")
    assert pushed.card_kept and "kept" in pushed.note and "tag" not in pushed.note
    assert pushed.files == ("config.json", "weights.safetensors")
    assert remote(hub, "alice/mood")["README.md"] == card


def test_a_card_without_our_tag_is_kept_too_and_the_note_says_what_follows(hub: FakeHub) -> None:
    hub.put("alice/mood", {"README.md": b"---\nlicense: mit\n---\n# Mine"})
    pushed = push(named("mood"), "alice/mood")
    assert remote(hub, "alice/mood")["README.md"] == b"---\nlicense: mit\n---\n# Mine"
    assert "Add the tag neurosteer" in pushed.note
    assert search("mood") == []


def test_a_card_that_nobody_edited_is_written_anew(hub: FakeHub) -> None:
    push(named("mood", description="First."), "alice/mood")
    pushed = push(named("mood", description="Second."), "alice/mood", licence="mit")
    card = remote(hub, "alice/mood")["README.md"].decode()
    assert not pushed.card_kept
    assert "Second." in card and "First." not in card and "license: mit" in card


def test_a_card_edited_here_goes_along_with_its_folder(hub: FakeHub, tmp_path: Path) -> None:
    folder = save_artifact(named("mood"), tmp_path / "mood")
    own = edited((folder / "README.md").read_bytes())
    (folder / "README.md").write_bytes(own)
    pushed = push(folder, "alice/mood")
    assert not pushed.card_kept
    assert remote(hub, "alice/mood")["README.md"] == own
    assert push(folder, "alice/mood").commit == pushed.commit


def test_edited_on_both_sides_the_hubs_card_stays_and_nothing_here_is_touched(hub: FakeHub, tmp_path: Path) -> None:
    folder = save_artifact(named("mood"), tmp_path / "mood")
    (folder / "README.md").write_text("# Mine, here", encoding="utf-8")
    hub.put("alice/mood", {"README.md": b"---\ntags: [neurosteer]\n---\n# Mine, there"})
    pushed = push(folder, "alice/mood")
    assert pushed.card_kept and "Yours differs" in pushed.note
    assert remote(hub, "alice/mood")["README.md"].endswith(b"# Mine, there")
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Mine, here"


def test_in_a_pack_each_card_is_kept_by_itself(hub: FakeHub) -> None:
    push([named("calm"), named("loud", seed=1)], "alice/pack")
    hub.put("alice/pack", {"calm/README.md": b"# Calm, by hand"})
    pushed = push([named("calm", seed=2), named("loud", seed=3)], "alice/pack")
    assert pushed.card_kept and "tag" not in pushed.note
    assert remote(hub, "alice/pack")["calm/README.md"] == b"# Calm, by hand"
    assert is_generated(remote(hub, "alice/pack")["loud/README.md"].decode())
    assert pushed.files == (
        "README.md", "calm/config.json", "calm/weights.safetensors", "config.json", "loud/README.md",
        "loud/config.json", "loud/weights.safetensors",
    )  # fmt: skip


# --- offline ---------------------------------------------------------------------------------------------------------


def test_what_was_pulled_is_used_offline_and_the_rest_is_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = push(named("mood"), "alice/mood").commit
    push([named("calm")], "alice/pack")
    pull("alice/mood")
    pull("alice/pack/calm")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for reference in ("alice/mood", "alice/mood@main", f"alice/mood@{commit}", "alice/pack/calm"):
        assert pull(reference).name in ("mood", "calm")
    refused(lambda: pull("alice/other"), HubUnreachable, "alice/other", "not pulled before")
    refused(lambda: push(named("mood"), "alice/mood"), HubUnreachable, "HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert pull("alice/mood", offline=True).name == "mood"
    assert hub.requests == []


def test_when_the_hub_is_away_what_was_pulled_is_used_with_a_warning(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, quick: list[float]
) -> None:
    push(named("mood"), "alice/mood")
    folder = pull_folder("alice/mood")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull_folder("alice/mood") == folder
    assert "as it was pulled before" in caplog.text
    refused(lambda: pull("alice/other"), HubUnreachable, "connection", "http://127.0.0.1:9")


# --- finding ---------------------------------------------------------------------------------------------------------

OTHER = ModelReference("other/model", None, 2, 8, 16, "ffff")


def put_all(hub: FakeHub) -> None:
    push(named("mood", description="One."), "alice/mood")
    push(make_circuit(name="few"), "alice/few", licence="mit")
    push(named("mine"), "bob/mine", token="hf_bob")
    narrow = SteeringVector(
        name="narrow", model=OTHER, method="pca", directions={1: torch.ones(8)}, norms={1: 2.0}, description="Two."
    )
    push(narrow, "bob/narrow", token="hf_bob")
    hub.put("bob/llm", {"README.md": b"---\ntags: [text-generation]\n---\n"})
    hub.repos["bob/narrow"].likes = 50
    hub.repos["alice/few"].likes = 5


def repos(found: list[Found]) -> list[str]:
    return [one.repo for one in found]


def test_search_asks_by_text_author_kind_and_base_model(hub: FakeHub) -> None:
    put_all(hub)
    assert sorted(repos(search())) == ["alice/few", "alice/mood", "bob/mine", "bob/narrow"]
    assert repos(search("moo")) == ["alice/mood"]
    assert repos(search(author="bob")) == ["bob/narrow", "bob/mine"]
    assert repos(search(kind="neuron-circuit")) == ["alice/few"]
    assert repos(search(base_model="other/model")) == ["bob/narrow"]
    assert len(search(limit=2)) == 2
    refused(lambda: search(kind="vector"), UsageError, "'vector'", "steering-vector")
    refused(lambda: search(limit=0), UsageError, "0")


def test_those_that_fit_the_model_come_first_also_when_others_are_liked_more(hub: FakeHub) -> None:
    put_all(hub)
    found = search(model=REFERENCE)
    assert repos(found) == ["alice/few", "alice/mood", "bob/mine", "bob/narrow"]
    assert [one.compatible for one in found] == [True, True, True, False]
    assert repos(search(model=REFERENCE, limit=1)) == ["alice/few"]
    assert repos(search(model=OTHER))[0] == "bob/narrow"
    assert all(one.compatible is None for one in search())
    same_shape = replace(REFERENCE, name="tiny/tuned", fingerprint="0" * 16)
    assert [one.compatible for one in search("mood", model=same_shape)] == [True]


def test_a_result_says_what_a_reader_needs(hub: FakeHub) -> None:
    put_all(hub)
    (few,) = search("few", model=REFERENCE)
    assert few == Found(
        repo="alice/few",
        author="alice",
        kinds=("neuron-circuit",),
        base_model="tiny/any",
        names=("few",),
        description="",
        downloads=0,
        likes=5,
        updated="2026-01-01",
        private=False,
        gated=False,
        compatible=True,
        licence="mit",
    )


@pytest.mark.parametrize(
    "front",
    [
        "neurosteer: [1, 2]",
        "neurosteer: {artifacts: {a: 1}}",
        "neurosteer: {artifacts: [1, null, {name: [x], shape: 7, description: {a: b}}]}",
        "ignore_metadata_errors: true",
        "base_model: [3, {a: b}]",
        "model-index: [{name: x, results: [{task: 3}]}]",
        "license: [a, b]",
        "eval_results: 3",
    ],
)
def test_one_odd_card_does_not_spoil_the_search_for_the_others(hub: FakeHub, front: str) -> None:
    put_all(hub)
    hub.put("bob/odd", {"README.md": f"---\ntags: [neurosteer]\n{front}\n---\n".encode()})
    found = repos(search(model=REFERENCE))
    assert set(found) == {"alice/few", "alice/mood", "bob/mine", "bob/narrow", "bob/odd"}


# --- repos that mean harm --------------------------------------------------------------------------------------------


def harmful(folder: Path) -> bytes:
    """A pickle that writes a file when it is loaded."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {folder / 'harmed'}",)

    return pickle.dumps(Payload())


def good_files() -> dict[str, bytes]:
    with TemporaryDirectory() as temporary:
        folder = save_artifact(named("mood"), Path(temporary) / "mood")
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetched(hub: FakeHub) -> list[str]:
    return [request.path for request in hub.requests if request.route == "resolve"]


def test_a_repo_of_pickles_is_refused_with_nothing_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    hub.put("bob/bad", {"pytorch_model.bin": harmful(tmp_path), "vector.pt": harmful(tmp_path), "config.json": b"{}"})
    refused(lambda: pull("bob/bad"), HubError, "bob/bad", "no artifact", "pytorch_model.bin", "run code")
    refused(lambda: list_artifacts("bob/bad"), HubError, "no artifact")
    assert fetched(hub) == []


def test_a_pickle_under_our_name_is_damage_and_is_never_loaded(hub: FakeHub, tmp_path: Path) -> None:
    hub.put("bob/bad", {**good_files(), "weights.safetensors": harmful(tmp_path)})
    refused(lambda: pull("bob/bad"), ArtifactError, "bob/bad cannot be used", "weights.safetensors", "damaged")
    assert not (tmp_path / "harmed").exists()


def test_only_the_three_files_of_an_artifact_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    extra = {"model.py": b"raise SystemExit", "a.pkl": harmful(tmp_path), "notes/x.md": b"x", "adapter.bin": b"y" * 99}
    hub.put("bob/mood", {**good_files(), **extra})
    folder = pull_folder("bob/mood")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "weights.safetensors"]
    assert {path.rpartition("/")[2] for path in fetched(hub)} == {"README.md", "config.json", "weights.safetensors"}


@pytest.mark.parametrize(
    ("name", "size"), [("weights.safetensors", 70 << 20), ("config.json", 5 << 20), ("README.md", 5 << 20)]
)
def test_a_huge_file_is_refused_before_it_is_downloaded(hub: FakeHub, name: str, size: int) -> None:
    hub.put("bob/bad", {**good_files(), name: File(b"x", large=True, claimed_size=size)})
    refused(lambda: pull("bob/bad"), ArtifactError, name, "bob/bad", f"{size / 1e6:.0f} MB")
    assert fetched(hub) == []


def test_a_repo_with_thousands_of_files_is_looked_at_in_part_only(hub: FakeHub) -> None:
    hub.put("bob/bad", {f"folder-{number}/x": b"" for number in range(5000)})
    refused(lambda: pull("bob/bad"), HubError, "no artifact")
    assert hub.routes().count("tree") <= 21  # pages of 50, 1,000 entries


def test_names_that_lead_out_of_the_cache_are_never_followed(hub: FakeHub, tmp_path: Path) -> None:
    good = good_files()
    hub.put(
        "bob/bad",
        {
            f"{folder}/{name}": data
            for folder in ("../evil", "..", "a/../../b", "C:\\x", "ok")
            for name, data in good.items()
        },
    )
    assert list_artifacts("bob/bad") == ["ok"]
    pull("bob/bad/ok")
    for reference in ("bob/bad/../evil", "bob/bad/..", "bob/bad/C:\\x"):
        refused(lambda reference=reference: pull(reference), UsageError)
    cache = tmp_path / "hub-cache"
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and cache not in path.parents]
    assert outside == []


def header_only(header: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "weights",
    [
        save({"layer.1": torch.ones(32), "layer.2": torch.ones(31)}),
        save({"layer.1": torch.ones(32, 32), "layer.2": torch.ones(32)}),
        save({"layer.1": torch.ones(32), "layer.2": torch.ones(32, dtype=torch.float16)}),
        save({"layer.1": torch.ones(32), "layer.2": torch.full((32,), float("nan"))}),
        save({"layer.1": torch.ones(32)}),
        save({"layer.1": torch.ones(32), "layer.2": torch.ones(32), "layer.999999": torch.ones(32)}),
        header_only({"layer.1": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        header_only({"layer.1": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd"),
        (1 << 60).to_bytes(8, "little") + b"{}",
        b"",
    ],
    ids=["short", "matrix", "half", "nan", "missing", "extra", "vast", "negative", "endless header", "empty"],
)  # fmt: skip
def test_weights_whose_header_does_not_fit_are_refused(hub: FakeHub, weights: bytes) -> None:
    hub.put("bob/bad", {**good_files(), "weights.safetensors": weights})
    message = refused(lambda: pull("bob/bad"), ArtifactError, "bob/bad cannot be used")
    assert "hub-cache" not in message


@pytest.mark.parametrize(
    "config",
    [b"[" * 100_000, b"\xff\xfe", b"{}", b'{"schema_version": 99}', b'{"schema_version": 1, "kind": "exec"}'],
    ids=["deep", "binary", "empty", "future", "kind"],
)  # fmt: skip
def test_configs_that_are_none_are_refused(hub: FakeHub, config: bytes) -> None:
    hub.put("bob/bad", {**good_files(), "config.json": config})
    refused(lambda: pull("bob/bad"), ArtifactError, "bob/bad cannot be used", "config.json")


def test_a_config_with_a_name_that_is_a_path_is_refused(hub: FakeHub) -> None:
    good = good_files()
    config = json.loads(good["config.json"]) | {"name": "../../evil"}
    hub.put("bob/bad", {**good, "config.json": json.dumps(config).encode()})
    refused(lambda: pull("bob/bad"), ArtifactError, "'../../evil' is not allowed")


def test_labels_with_html_and_terminal_codes_come_out_as_plain_text(hub: FakeHub, run: Run) -> None:
    evil = "\x1b[2J<img src=x onerror=alert(1)>\n---\nlicense: evil"
    push(named("mood", description=evil), "alice/mood")
    (found,) = search("mood")
    for text in (found.description, run("search", "mood").out):
        assert "\x1b" not in text and "\n---" not in text
    assert found.licence == "apache-2.0"


def test_a_card_is_read_up_to_a_limit_and_odd_bytes_do_no_harm(hub: FakeHub) -> None:
    hub.put("bob/odd", {**good_files(), "README.md": b"# Hi \xff\xfe"})
    assert read_card("bob/odd").startswith("# Hi ")
    hub.put("bob/long", {**good_files(), "README.md": b"x" * (2 << 20)})
    refused(lambda: read_card("bob/long"), HubError, "bob/long", "2.1 MB")
    files = good_files()
    del files["README.md"]
    hub.put("bob/none", files)
    assert read_card("bob/none") == ""
    assert pull("bob/none").name == "mood"


def test_the_hub_is_not_believed_when_its_listing_and_its_files_differ(hub: FakeHub) -> None:
    hub.put("bob/bad", {**good_files(), "config.json": File(b'{"a": 1}', claimed_size=3)})
    refused(lambda: pull("bob/bad"), HubError, "config.json of bob/bad arrived damaged")


# --- wherever an artifact can be named -------------------------------------------------------------------------------


def test_a_repo_can_be_used_wherever_an_artifact_is_named(hub: FakeHub, run: Run) -> None:
    push(named("mood"), "alice/mood")
    push([named("calm"), named("loud", seed=1)], "alice/pack")
    assert resolve("alice/mood").name == "mood"
    use = parse_use("alice/pack/calm:0.5")
    assert use.strength == 0.5
    shown = run("inspect", "alice/pack/loud@main", "--json")
    assert shown.code == 0 and json.loads(shown.out)["name"] == "loud"
    assert neurosteer.pull is pull and neurosteer.push is push and neurosteer.search is search


def test_a_name_that_is_neither_here_nor_there_says_both(hub: FakeHub) -> None:
    refused(lambda: resolve("alice/nothing"), HubError, "no folder 'alice/nothing'", "The Hub knows no alice/nothing")
    refused(lambda: resolve("nothing"), ArtifactError, "neither a folder nor a name in vectors/", "user/repo")


def test_a_folder_comes_before_a_repo_of_the_same_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    push(named("there"), "alice/mood")
    save_artifact(named("here"), tmp_path / "alice" / "mood")
    hub.requests.clear()
    assert resolve("alice/mood").name == "here"
    assert hub.requests == []


def test_an_artifact_of_another_shape_is_refused_by_the_model_not_by_the_hub(hub: FakeHub) -> None:
    from neurosteer.artifacts.artifact import check_model

    push(named("mood"), "alice/mood")
    with pytest.raises(MismatchError):
        check_model(pull("alice/mood"), OTHER)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_pushes_searches_and_pulls(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    folder = save_artifact(named("mood"), tmp_path / "mood")
    pushed = run("push", folder, "alice/mood", "--licence", "mit", "--json")
    assert pushed.code == 0, pushed.err
    assert json.loads(pushed.out)["commit"] == hub.repos["alice/mood"].head.oid
    found = run("search", "mood", "--base-model", "tiny/any", "--json")
    assert [one["repo"] for one in json.loads(found.out)["found"]] == ["alice/mood"]
    assert "alice/mood" in run("search", "mood").out
    assert "fewer words" in run("search", "nothing-like-it").out
    pulled = run("pull", "alice/mood", "--out", tmp_path / "back", "--json")
    assert json.loads(pulled.out)["name"] == "mood"
    assert (tmp_path / "back" / "README.md").read_bytes() == remote(hub, "alice/mood")["README.md"]
    assert load(tmp_path / "back").name == "mood"
    assert_one_clear_line(run("pull", "alice/mood", "--out", tmp_path / "back"), "exists")
    assert run("pull", "alice/mood", "--offline").code == 0


def test_the_command_line_pushes_packs_and_says_what_was_kept(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    folders = [save_artifact(named(name), tmp_path / name) for name in ("calm", "loud")]
    assert run("push", *folders, "alice/pack", "--private").code == 0
    assert list_artifacts("alice/pack") == ["calm", "loud"] and hub.repos["alice/pack"].private
    hub.put("alice/pack", {"README.md": b"by hand"})
    again = run("push", *folders, "alice/pack", "--private")
    assert again.code == 0 and "edited by hand and is kept" in again.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "alice/mood"), ("only 'alice/mood'",)),
        (("push", "no-such-folder", "alice/mood"), ("no-such-folder",)),
        (("pull", "alice/none"), ("knows no alice/none",)),
        (("pull", "none"), ("user/repo",)),
        (("search", "--kind", "vector"), ("steering-vector",)),
        (("steer", "--use", "alice/none:1", "--prompt", "x"), ("no folder 'alice/none'",)),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    hub: FakeHub, run: Run, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_one_clear_line(run(*arguments), *words)


def test_pulling_into_a_folder_that_cannot_be_written_leaves_nothing(hub: FakeHub, tmp_path: Path) -> None:
    push(named("mood"), "alice/mood")
    (tmp_path / "file").write_text("x")
    refused(lambda: pull_into("alice/mood", tmp_path / "file" / "mood"), UsageError, "could not be written")
    refused(lambda: pull_into("alice/mood", tmp_path / "file"), UsageError, "exists")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.slow
def test_another_process_finds_the_hub_by_its_address_alone(tmp_path: Path) -> None:
    """The server started as a program, the command line in a process of its own."""
    save_artifact(named("mood"), tmp_path / "mood")
    tests = Path(__file__).parent
    server = subprocess.Popen(
        [sys.executable, str(tests / "hub_server.py"), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        settings = {
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_alice",
            "HF_HOME": str(tmp_path / "hf"),
        }
        environment = {**os.environ, **settings}
        ran = [
            subprocess.run(
                [sys.executable, "-m", "neurosteer.cli", *arguments], capture_output=True, text=True, env=environment,
                cwd=tmp_path, timeout=120,
            )
            for arguments in (["push", "mood", "alice/mood"], ["pull", "alice/mood", "--out", "back"])
        ]  # fmt: skip
    finally:
        server.kill()
        server.wait()
    assert [one.returncode for one in ran] == [0, 0], [one.stderr for one in ran]
    assert ran[0].stderr == "" and f"Published at {url}/alice/mood" in ran[0].stdout
    assert load(tmp_path / "back").name == "mood"


def test_nothing_that_the_environment_says_of_the_hub_reaches_the_tests() -> None:
    said = {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_TOKEN": "hf_mine", "HF_ENDPOINT": "http://127.0.0.1:9",
        "HUGGING_FACE_HUB_TOKEN": "hf_mine", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    look = (
        "import hermetic; from huggingface_hub import constants, get_token\n"
        "print(constants.HF_HUB_OFFLINE, get_token(), constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", look],
        env={**os.environ, **said},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == ["False", "None", "https://huggingface.co", "10"]
    conftest = (Path(__file__).parent / "conftest.py").read_text(encoding="utf-8")
    imported = [line.split()[1] for line in conftest.splitlines() if line.startswith(("import ", "from "))]
    ours_or_others = [name for name in imported if name.partition(".")[0] not in sys.stdlib_module_names]
    assert ours_or_others[0] == "hermetic"


# --- the server itself -----------------------------------------------------------------------------------------------


def test_the_server_names_files_as_git_does(tmp_path: Path) -> None:
    """The hashes that pushes are compared by, against git itself where there is one."""
    content = b"some text\n" * 100
    (tmp_path / "file").write_bytes(content)
    try:
        ran = subprocess.run(["git", "hash-object", str(tmp_path / "file")], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("there is no git here")
    assert File(content).blob == ran.stdout.strip()
    assert File(content, large=True).etag == hashlib.sha256(content).hexdigest()
