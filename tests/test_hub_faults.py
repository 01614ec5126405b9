"""Whatever goes wrong between us and the Hub is said in one line, tried again where that helps, and loses nothing."""

import errno
import logging
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from checks import refused
from hub_server import FakeHub
from tiny import make_vector

from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.storage import save
from neurosteer.errors import ArtifactError, HubError, HubUnreachable
from neurosteer.hub import list_artifacts, pull, pull_folder, push, read_card, search, whoami

TOKEN = "hf_alice"
MOOD = make_vector(name="mood", provenance=Provenance(separation={1: 0.5, 2: 0.75}))
NO_REPO = {"X-Error-Code": "RepoNotFound"}
NO_REVISION = {"X-Error-Code": "RevisionNotFound"}
NO_ENTRY = {"X-Error-Code": "EntryNotFound"}
GATED = {"X-Error-Code": "GatedRepo"}
LATER = {"Retry-After": "3600"}
PUSH_ROUTES = (
    "whoami",
    "info",
    "create",
    "tree",
    "paths-info",
    "validate-yaml",
    "preupload",
    "lfs-batch",
    "lfs-put",
    "commit",
)


@dataclass(frozen=True)
class Case:
    """A fault, what the message must hold, and whether it comes after a repo was made."""

    route: str
    what: str
    words: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    made: bool = True

    def __str__(self) -> str:
        return f"{self.route} {self.what} {self.options.get('status', '')}".strip()


def answered(route: str, status: int, *words: str, made: bool = True, **options: Any) -> Case:
    return Case(route, "status", words, {"status": status, **options}, made)


def happening(route: str, what: str, *words: str, made: bool = True, **options: Any) -> Case:
    return Case(route, what, words, options, made)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def impatient(quick: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries are short, and none waits for the next."""
    monkeypatch.setattr("neurosteer.hub.client.QUICK_S", 1.5)
    for module in ("commits", "pulling"):
        monkeypatch.setattr(f"neurosteer.hub.{module}._LEAST_S", 1.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)


# --- pushing ---------------------------------------------------------------------------------------------------------

PUSHING = [
    answered("whoami", 401, "refused the token", "hf auth login", "HF_TOKEN", made=False),
    answered("whoami", 403, "may not", "settings/tokens", made=False),
    answered("whoami", 429, "no more requests", "in 3600 s", headers=LATER, made=False),
    answered("whoami", 500, "failed (error 500)", "try again later", made=False),
    happening("whoami", "cut", "connection", "check the network", made=False),
    happening("whoami", "hang", "did not answer in time", seconds=4.0, made=False),
    happening("whoami", "not json", "did not answer like the Hub", "HF_ENDPOINT", made=False),
    answered("info", 401, "refused the token", made=False),
    answered("info", 503, "failed (error 503)", "push to alice/mood", made=False),
    happening("info", "not json", "did not answer like the Hub", made=False),
    answered("create", 402, "no room", "create alice/mood", "pay first", body='{"error": "pay first"}', made=False),
    answered("create", 403, "may not create alice/mood", "write access", made=False),
    answered("create", 429, "no more requests", "create alice/mood", made=False),
    answered("create", 500, "failed (error 500)", "create alice/mood", made=False),
    happening("create", "cut", "connection", "create alice/mood", made=False),
    answered("info", 503, "failed (error 503)", skip=1),
    answered("info", 404, "knows no alice/mood", headers=NO_REPO, skip=1),
    answered("tree", 500, "failed (error 500)"),
    answered("validate-yaml", 400, "refuses the card", "no such one", body='{"errors": [{"message": "no such one"}]}'),
    happening("validate-yaml", "not json", "connection|did not answer"),
    answered("preupload", 403, "may not push to alice/mood"),
    answered("preupload", 429, "no more requests", headers=LATER),
    answered("preupload", 503, "failed (error 503)"),
    answered("lfs-batch", 401, "refused the token"),
    answered("lfs-batch", 500, "failed (error 500)"),
    answered("lfs-batch", 507, "failed|no room"),
    answered("lfs-put", 400, "refused (error 400)"),
    answered("lfs-put", 403, "may not push"),
    answered("lfs-put", 503, "failed (error 503)"),
    happening("lfs-put", "cut", "connection"),
    happening("lfs-put", "hang", "did not answer in time", seconds=4.0),
    answered("commit", 401, "refused the token"),
    answered("commit", 403, "may not push to alice/mood"),
    answered("commit", 404, "knows no alice/mood", headers=NO_REPO),
    answered("commit", 409, "Somebody else changed alice/mood"),
    answered("commit", 412, "Somebody else changed alice/mood"),
    answered("commit", 413, "no room", "too big", body='{"error": "too big"}'),
    answered("commit", 422, "refused (error 422)", "odd", body='{"error": "odd"}'),
    answered("commit", 429, "no more requests", "in 3600 s", headers=LATER),
    answered("commit", 500, "failed (error 500)"),
    answered("commit", 504, "failed (error 504)"),
    happening("commit", "cut", "connection"),
    happening("commit", "hang", "did not answer in time", seconds=4.0),
    happening("commit", "race", "Somebody else changed alice/mood"),
]  # fmt: skip


@pytest.mark.parametrize("case", PUSHING, ids=str)
def test_a_push_that_fails_says_why_and_loses_nothing(
    hub: FakeHub, tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save(MOOD, tmp_path / "work" / "mood")
    (folder / "README.md").write_text("# My own words", encoding="utf-8")
    before = files_of(folder)
    hub.fail(case.route, case.what, times=1000, **case.options)
    with caplog.at_level(logging.DEBUG, logger="neurosteer"):
        message = refused(lambda: push(folder, "alice/mood"), HubError)
    assert all(any(word in message for word in words.split("|")) for words in case.words), message
    assert (f"{hub.url}/alice/mood was made for it" in message) == case.made, message
    assert files_of(folder) == before and list((tmp_path / "work").iterdir()) == [folder]
    assert TOKEN not in message + caplog.text + "".join(capfd.readouterr())
    hub.faults.clear()
    push(folder, "alice/mood")
    assert files_of(folder) == before
    assert pull("alice/mood").name == "mood"


@pytest.mark.parametrize("route", PUSH_ROUTES)
@pytest.mark.parametrize("what", ["status", "cut", "cut after"])
def test_a_fault_that_passes_costs_nothing_but_time(hub: FakeHub, tmp_path: Path, route: str, what: str) -> None:
    push(make_vector(name="mood", seed=9), "alice/other")
    hub.put("alice/seen", {"NOTES.md": b"x"})
    fault = hub.fail(route, what, status=503, times=2 if what == "status" else 1)
    repo = "alice/mood" if route == "create" else "alice/seen"
    push(MOOD, repo)
    assert fault.times == 0
    uploads = [commit for commit in hub.repos[repo].commits if commit.title.startswith("Upload")]
    assert len(uploads) == 1
    assert pull(repo).name == "mood"


def test_the_hubs_wish_to_wait_is_followed_up_to_a_minute(hub: FakeHub, quick: list[float]) -> None:
    hub.fail("commit", status=429, headers={"Retry-After": "7"})
    hub.fail("whoami", status=429, headers={"RateLimit": '"api";r=0;t=11', "Retry-After": "3000"})
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    hub.fail("create", status=503, headers={"Retry-After": later})
    push(MOOD, "alice/mood")
    assert quick[0] == 11 and 25 < quick[1] <= 30 and quick[2] == 7
    quick.clear()
    hub.fail("whoami", status=429, headers={"Retry-After": "61"})
    refused(whoami, HubUnreachable, "in 61 s")
    assert quick == []


def test_a_lost_race_is_run_again_on_top_of_what_came_first(hub: FakeHub) -> None:
    push(MOOD, "alice/mood")
    hub.fail("commit", "race", times=2)
    push(make_vector(name="mood", seed=1), "alice/mood")
    assert "NOTES.md" in hub.repos["alice/mood"].head.files
    assert hub.repos["alice/mood"].head.title.startswith("Upload")


def test_a_card_edited_during_the_race_is_kept(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(MOOD, "alice/mood")
    monkeypatch.setattr(hub, "race", lambda repo: hub.put(repo, {"README.md": b"---\ntags: [neurosteer]\n---\nmine"}))
    hub.fail("commit", "race")
    pushed = push(make_vector(name="mood", seed=1, description="New."), "alice/mood")
    assert pushed.card_kept
    assert hub.repos["alice/mood"].head.files["README.md"].data.endswith(b"mine")


def test_two_pushes_at_once_both_arrive(hub: FakeHub) -> None:
    push([make_vector(name="first")], "alice/pack")
    threads = [
        threading.Thread(target=push, args=([make_vector(name=f"part-{number}", seed=number)], "alice/pack"))
        for number in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list_artifacts("alice/pack") == ["first", "part-0", "part-1", "part-2"]
    assert all(f"part-{number}" in read_card("alice/pack") for number in range(3))


def test_files_that_arrive_changed_are_noticed(hub: FakeHub) -> None:
    hub.put("alice/mood", {"NOTES.md": b"x"})
    hub.fail("paths-info", "other hash", skip=1)
    message = refused(lambda: push(MOOD, "alice/mood"), HubError, "does not hold what was sent", "config.json")
    assert hub.repos["alice/mood"].head.oid[:8] in message and f"{hub.url}/alice/mood" in message


def test_a_push_that_could_not_be_compared_says_that_it_was_published(hub: FakeHub) -> None:
    hub.put("alice/mood", {"NOTES.md": b"x"})
    hub.fail("paths-info", status=503, skip=1, times=10)
    message = refused(lambda: push(MOOD, "alice/mood"), HubUnreachable, "was published as commit", "error 503")
    assert hub.repos["alice/mood"].head.oid[:8] in message and "made for it" not in message


def test_a_full_disk_while_preparing_stops_before_anything_is_published(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("neurosteer.artifacts.storage.save_file", full)
    refused(lambda: push(MOOD, "alice/mood"), ArtifactError, "No space left on device")
    assert hub.requests == [] and hub.repos == {}


# --- pulling ---------------------------------------------------------------------------------------------------------

PULLING = [
    answered("info", 401, "refused the token", "hf auth login"),
    answered("info", 403, "may not pull alice/mood"),
    answered("info", 404, "knows no alice/mood", "ask its owner", headers=NO_REPO),
    answered("info", 404, "no such revision", headers=NO_REVISION),
    answered("info", 429, "no more requests", "in 3600 s", headers=LATER),
    answered("info", 502, "failed (error 502)", "pull alice/mood"),
    happening("info", "cut", "connection"),
    happening("info", "half", "connection"),
    happening("info", "hang", "did not answer in time", seconds=4.0),
    happening("info", "not json", "did not answer like the Hub"),
    answered("paths-info", 500, "failed (error 500)"),
    answered("head", 403, "gated", "/alice/mood", headers=GATED),
    answered("head", 404, "lacks a file", headers=NO_ENTRY),
    answered("head", 503, "failed (error 503)"),
    happening("head", "cut", "connection"),
    happening("head", "hang", "did not answer in time", seconds=4.0),
    answered("resolve", 403, "may not fetch"),
    answered("resolve", 429, "no more requests", headers=LATER),
    answered("resolve", 500, "failed (error 500)"),
    happening("resolve", "cut", "connection"),
    happening("resolve", "hang", "did not answer in time", seconds=4.0),
    happening("resolve", "drip", "did not answer in time", seconds=4.0),
    happening("resolve", "other bytes", "arrived damaged twice"),
    happening("resolve", "not json", "broke off|arrived damaged twice"),
]  # fmt: skip


@pytest.mark.parametrize("case", PULLING, ids=str)
def test_a_pull_that_fails_says_why_and_leaves_nothing_half_done(
    hub: FakeHub, tmp_path: Path, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    push(MOOD, "alice/mood")
    hub.fail(case.route, case.what, times=1000, **case.options)
    with caplog.at_level(logging.DEBUG, logger="neurosteer"):
        message = refused(lambda: pull("alice/mood"), HubError, "alice/mood")
    assert all(any(word in message for word in words.split("|")) for words in case.words), message
    assert TOKEN not in message + caplog.text
    refused(lambda: pull("alice/mood", offline=True), HubUnreachable, "not pulled before")
    hub.faults.clear()
    assert pull("alice/mood").name == "mood"
    assert pull("alice/mood", offline=True).name == "mood"


@pytest.mark.parametrize("what", ["status", "cut", "half", "other bytes"])
def test_a_download_that_breaks_once_is_made_good(hub: FakeHub, tmp_path: Path, what: str) -> None:
    push(MOOD, "alice/mood")
    fault = hub.fail("resolve", what, status=503)
    save(pull("alice/mood"), tmp_path / "back")
    save(MOOD, tmp_path / "here")
    assert fault.times == 0
    for name in ("config.json", "weights.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_try_that_took_too_long_leaves_no_thread_behind(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neurosteer.hub.searching.SEARCH_S", 1.5)
    push(MOOD, "alice/mood")
    before = set(threading.enumerate())
    hub.fail("info", "hang", seconds=4.0, times=1000)
    hub.fail("models", "hang", seconds=4.0, times=1000)
    for call in (lambda: pull("alice/mood"), lambda: list_artifacts("alice/mood"), search):
        refused(call, HubUnreachable, "did not answer in time")
    assert set(threading.enumerate()) <= before


def test_damage_in_the_cache_is_noticed_and_mended(hub: FakeHub) -> None:
    push(MOOD, "alice/mood")
    weights = pull_folder("alice/mood") / "weights.safetensors"
    whole = weights.read_bytes()
    weights.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert pull("alice/mood").name == "mood"
    assert weights.read_bytes() == whole


def test_a_full_disk_while_pulling_is_said_and_leaves_nothing(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    push(MOOD, "alice/mood")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download._chmod_and_move", full)
        refused(lambda: pull("alice/mood"), HubError, "disk is full", "HF_HOME", "alice/mood")
    refused(lambda: pull("alice/mood", offline=True), HubUnreachable)
    assert pull("alice/mood").name == "mood"


def test_a_cache_that_cannot_be_written_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    push(MOOD, "alice/mood")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file"))
    refused(lambda: pull("alice/mood"), HubError, "cache could not be used", "HF_HOME")


def test_a_hub_that_is_away_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for call in (whoami, search, lambda: push(MOOD, "alice/mood"), lambda: pull("a/b"), lambda: list_artifacts("a/b")):
        refused(call, HubUnreachable, "http://127.0.0.1:9", "check the network")


def test_searching_and_reading_cards_fail_in_one_line_too(hub: FakeHub) -> None:
    push(MOOD, "alice/mood")
    hub.fail("models", status=500, times=1000)
    refused(search, HubUnreachable, "failed (error 500)", "search")
    hub.fail("tree", status=404, headers=NO_REPO, times=1000)
    refused(lambda: list_artifacts("alice/mood"), HubError, "alice/mood")
    hub.fail("resolve", "cut", times=1000)
    refused(lambda: read_card("alice/mood"), HubUnreachable, "connection", "README.md of alice/mood")


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 403, 413, 422, 500])
def test_a_server_that_repeats_the_token_does_not_get_it_into_a_message(hub: FakeHub, status: int) -> None:
    echo = {"X-Error-Message": f"bad token {TOKEN}"}
    hub.fail("commit", status=status, headers=echo, body=f'{{"error": "your token is {TOKEN}"}}', times=10)
    message = refused(lambda: push(MOOD, "alice/mood"), HubError)
    assert TOKEN not in message


def test_the_token_is_in_no_file_and_no_card(hub: FakeHub, tmp_path: Path) -> None:
    push(MOOD, "alice/mood")
    pull("alice/mood")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert all(TOKEN.encode() not in file.data for file in hub.repos["alice/mood"].head.files.values())
