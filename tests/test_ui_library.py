"""The Library tab without a browser: the shelf, the Hub (the real client, a server of our own), and publishing."""

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import FakeHub
from pages import HOSTILE, Ready, mix_of, told
from tiny import Tiny

from neurosteer import hub as library
from neurosteer.artifacts.cards import is_generated
from neurosteer.artifacts.storage import unpack
from neurosteer.hub.commits import _note
from neurosteer.steering.session import Session
from neurosteer.ui.limits import visitors_token
from neurosteer.ui.loading import Models
from neurosteer.ui.show import library as shown
from neurosteer.ui.tabs.library import LibraryHandlers, Publication
from neurosteer.ui.turns import Caller


def asking(from_page: bool) -> Any:
    """A request as the guard at the door marks it."""
    scope = {"neurosteer.caller": Caller("127.0.0.1", from_page)}
    return SimpleNamespace(request=SimpleNamespace(scope=scope), session_hash="anna")


FROM_PAGE = asking(True)

FAILED = {"found_note", "hub_error"}
"""All that changes where nothing was pulled."""


@pytest.fixture
def tab(llama: Tiny) -> LibraryHandlers:
    return LibraryHandlers(Models.of(Ready(Session(llama.lm)), llama.lm.name))


def publication(**given: Any) -> Publication:
    return Publication("mood", "alice/mood", "public", "mit", "Turns the mood.")._replace(**given)


def push(tab: LibraryHandlers, mood: Any, ask: Publication, login: Any = None) -> dict[str, str]:
    return tab.push(FROM_PAGE, login, told, ask, mix_of({"mood": mood}, []))


# --- the shelf -------------------------------------------------------------------------------------------------------


def test_the_shelf_says_where_each_comes_from_and_offers_ones_own_to_publish(
    tab: LibraryHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.ui.shelf.released", lambda: {"sentiment": mood})
    found = tab.shelf(mix_of({"sentiment": mood, "me/vector": mood, "mine": mood}, []))
    labels, own = found["labels"], found["label"]
    assert labels["choices"] == [
        ("sentiment (released)", "sentiment"), ("me/vector (pulled)", "me/vector"), ("mine (mine)", "mine"),
    ]  # fmt: skip
    assert own["choices"] == ["mine"] and own["value"] == "mine"


def test_an_artifact_of_the_shelf_is_shown_downloaded_used_and_removed(tab: LibraryHandlers, mood: Any) -> None:
    mix = mix_of({"mood": mood, "other": mood}, ["other"], 2.0)
    shown_card = tab.show("mood", mix)
    path = shown_card["download"]["value"]
    assert "mood" in shown_card["card"] and "20" not in path and unpack(Path(path)).name == "mood"
    used = tab.use("mood", mix)
    assert used["tabs"]["selected"] == "steer" and used["shelf_error"] == "" and used["standing"] == ["other", "mood"]
    assert used["slider_1"]["value"] == 2.0  # the other slider stays where it was
    removed = tab.remove("other", mix)
    assert removed["labels"]["value"] is None and removed["shelf_error"] == ""
    assert list(removed["shelf"]) == ["mood"] and removed["standing"] == []
    for handler in (tab.use, tab.remove):
        assert "Choose something" in handler(None, mix)["shelf_error"]
    assert "ns-hint" in tab.show(None, mix)["card"]


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_what_one_visitor_publishes_another_finds_pulls_and_steers_with(
    tab: LibraryHandlers, mood: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(tab, mood, publication())
    assert pushed["push_error"] == "" and f"{hub.url}/alice/mood" in pushed["push_note"]
    assert "Published" in pushed["push_note"]
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    found = tab.search(None, "mood", "", False, None)
    choices = found["found"]["choices"]
    assert (found["found_note"], found["hub_error"]) == ("", "") and [value for _, value in choices] == ["alice/mood"]
    assert "fits this model" in choices[0][0]
    looked = tab.look(None, "alice/mood")
    assert (looked["reference"], looked["hub_error"]) == ("alice/mood", "") and not looked["names"]["visible"]
    assert "Turns the mood." in looked["hub_card"]
    pulled = tab.pull(None, looked["reference"], None, mix_of({}, []))
    assert pulled["hub_error"] == "" and "alice/mood" in pulled["found_note"] and pulled["standing"] == ["alice/mood"]
    assert pulled["shelf"]["alice/mood"].directions[1].equal(mood.directions[1])


def test_one_of_a_pack_is_pulled_by_name(tab: LibraryHandlers, mood: Any, hub: FakeHub) -> None:
    library.push([replace(mood, name="one"), replace(mood, name="two")], "alice/pack")
    looked = tab.look(None, "alice/pack")
    assert looked["hub_error"] == "" and looked["names"]["visible"] and looked["names"]["choices"] == ["one", "two"]
    pulled = tab.pull(None, "alice/pack", "two", mix_of({}, []))
    shelf = pulled["shelf"]
    assert pulled["hub_error"] == "" and list(shelf) == ["alice/pack/two"] and shelf["alice/pack/two"].name == "two"
    refused = tab.pull(None, "alice/pack", None, mix_of({}, []))
    assert "one" in refused["hub_error"] and "two" in refused["hub_error"] and set(refused) == FAILED


def test_nothing_found_says_what_to_do(tab: LibraryHandlers, hub: FakeHub) -> None:
    found = tab.search(None, "no-such-thing", "", True, None)
    assert not found["found"]["visible"] and "build your own" in found["found_note"] and found["hub_error"] == ""


@pytest.mark.slow
def test_a_hub_that_is_away_is_one_line_and_nothing_is_lost(
    tab: LibraryHandlers, mood: Any, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("neurosteer.hub.client._FIRST_PAUSE_S", 0.01)
    pulled = tab.pull(None, "a/b", None, mix_of({"mood": mood}, ["mood"]))
    outcomes = [
        tab.search(None, "x", "", False, None)["hub_error"],
        tab.look(None, "a/b")["hub_error"],
        pulled["hub_error"],
        push(tab, mood, publication())["push_error"],
    ]
    for error in outcomes:
        assert error.count("<p") == 1 and "Hub" in error and "hf_alice" not in error
    assert set(pulled) == FAILED
    assert "not logged in" in tab.who(None)["who"]


def test_publishing_needs_a_login_and_a_choice(
    tab: LibraryHandlers, mood: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "You publish as alice" in tab.who(None)["who"]
    assert "Choose what to publish" in push(tab, mood, publication(label=None))["push_error"]
    assert "Choose what to publish" in push(tab, mood, publication(label="gone"))["push_error"]
    monkeypatch.delenv("HF_TOKEN")
    assert "not logged in" in tab.who(None)["who"] and "not logged in" in push(tab, mood, publication())["push_error"]
    assert not hub.repos


def test_only_the_page_itself_publishes(tab: LibraryHandlers, mood: Any, hub: FakeHub) -> None:
    found = tab.push(asking(False), None, told, publication(), mix_of({"mood": mood}, []))
    assert found["push_note"] == "" and "own page" in found["push_error"] and not hub.repos


def test_a_page_open_to_others_lends_its_owners_token_to_nobody(
    tab: LibraryHandlers, mood: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    assert (
        "Nobody publishes from here" in tab.who(None)["who"]
        and "--trust-visitors" in push(tab, mood, publication())["push_error"]
    )
    assert not hub.repos
    monkeypatch.setenv("NEUROSTEER_TRUST_VISITORS", "1")
    assert "You publish as alice" in tab.who(None)["who"] and push(tab, mood, publication())["push_error"] == ""
    assert list(hub.repos) == ["alice/mood"]


def test_a_space_lends_its_own_token_to_nobody(
    tab: LibraryHandlers, mood: Any, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.push(mood, "alice/secret", private=True)
    monkeypatch.setenv("SPACE_ID", "alice/space")
    assert "not logged in" in tab.who(None)["who"]
    assert "Sign in" in push(tab, mood, publication())["push_error"] and list(hub.repos) == ["alice/secret"]
    assert tab.search(None, "secret", "", False, None)["found"]["choices"] == []
    assert "alice/secret" in tab.pull(None, "alice/secret", None, mix_of({}, []))["hub_error"]
    bob = SimpleNamespace(token="hf_bob")
    assert visitors_token(bob) == "hf_bob" and "You publish as bob" in tab.who(bob)["who"]  # type: ignore[arg-type]
    pushed = push(tab, mood, publication(repo="bob/mood"), bob)
    assert pushed["push_error"] == "" and "bob/mood" in pushed["push_note"] and list(hub.repos)[-1] == "bob/mood"


def test_an_artifact_of_another_model_is_refused(tab: LibraryHandlers, mood: Any, hub: FakeHub) -> None:
    library.push(replace(mood, model=replace(mood.model, n_layers=77)), "alice/foreign")
    found = tab.pull(None, "alice/foreign", None, mix_of({}, []))
    assert found["found_note"] == "" and "77 layers" in found["hub_error"] and set(found) == FAILED


# --- what strangers write --------------------------------------------------------------------------------------------


def test_a_strangers_card_is_text_and_nothing_else() -> None:
    card = (
        "---\nlicense: mit\n---\n# Title\n\n"
        f"{HOSTILE}\n\n![pixel](https://evil.example/p.png) [click](javascript:alert(1)) [file](file:///etc/passwd) "
        "[fine](https://ok.example/x) <https://evil.example>\n\n"
        "| a | b |\n|---|---|\n| <b>x</b> | `y` |\n\n```python\nprint('<img>')\n```\n<!-- hidden -->\n"
    )
    html = shown.hub_card(card)
    assert "license" not in html and "hidden" not in html
    assert "<h1>Title</h1>" in html and "<table>" in html and "<code" in html
    for tag in ("<script", "<img", "<b>", "<iframe"):
        assert tag not in html
    rest = 'target="_blank" rel="noopener noreferrer nofollow">'  # a picture becomes a link to it
    assert re.findall(r"<a [^>]*>", html) == [
        f'<a href="https://{where}" {rest}' for where in ("evil.example/p.png", "ok.example/x")
    ]


LONG = 4_000_000
COSTLY = {
    "newlines": "---" + "\n" * LONG,
    "newlines before": "\n" * LONG + "x",
    "openings of comments": "<!--" * (LONG // 4),
    "comments": "<!---->" * (LONG // 7),
    "fences": "---\n" * (LONG // 4),
    "fences and blanks": "---\n" + "\n---\t\t\t\t" * (LONG // 8),
    "blanks": "---" + " " * LONG + "x",
    "marks": "---\nx\n---\n" + "<!-- Written by NeuroSteer; what you change above is kept. SHA-256: " * (LONG // 70),
    "brackets": "[" * LONG,
    "stars": "*a_b " * (LONG // 5),
    "quotes": "> " * (LONG // 2),
    "backquotes": "`" + "``a`b" * (LONG // 5),
    "table": "|a" * 500 + "\n" + "|-" * 500 + "\n" + "|" * LONG,
    "links": "[a](" * (LONG // 4),
}


@pytest.mark.parametrize("what", COSTLY)
def test_a_card_of_four_megabytes_costs_no_more_than_a_second_whatever_it_holds(what: str) -> None:
    began = time.thread_time()
    shown.hub_card(COSTLY[what])
    assert time.thread_time() - began < 1
    began = time.thread_time()
    assert not is_generated(COSTLY[what])
    assert "was edited by hand" in _note({"README.md": COSTLY[what]}, {})
    assert time.thread_time() - began < 1


def test_comments_and_metadata_are_left_out_and_nothing_else() -> None:
    html = shown.hub_card("\n---\r\na: 1\r\n---\r\nfirst <!-- a --> second\n\n<!--\nb\n--> third <!-- open")
    assert "first  second" in html and "third" in html and "open" in html and "a: 1" not in html
    assert "<hr" in shown.hub_card("text\n\n---\nmore\n\n---\n")


def test_a_result_is_one_line() -> None:
    found = library.Found(
        repo="u/r", author="u", kinds=(), base_model=None, names=(), description="", downloads=1234, likes=5,
        updated="", private=True, gated=True, compatible=False, licence=None,
    )  # fmt: skip
    line = shown.found_line(found)
    assert line == "u/r · for another model · private · gated: ask for access on its page · ♥ 5 · 1,234 downloads"
    assert len(shown.found_line(replace(found, repo="u/" + "r" * 300))) <= 160


def test_the_published_line_is_escaped_and_links_only_to_the_web() -> None:
    pushed = library.Pushed(repo="u/<b>", url="javascript:alert(1)", commit="c", files=(), card_kept=True)
    html = shown.published(pushed)
    assert "href" not in html and "<b>" not in html and "was kept" in html
    assert "href='https://x/y'" in shown.published(replace(pushed, url="https://x/y"))
