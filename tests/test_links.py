"""A recipe as a link: what is written is read back, and nothing in a link reaches further than it should."""

from urllib.parse import parse_qs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurosteer.errors import UsageError
from neurosteer.ui.limits import MAX_PROMPT
from neurosteer.ui.links import Link, check_shareable, parse_link

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True)
REFERENCES = NAMES | st.builds(lambda *parts: f"{parts[0]}/{parts[1]}@{parts[2]}", NAMES, NAMES, NAMES)
POSITIONS = st.floats(-3, 3).map(lambda number: float(f"{number:g}"))
LINKS = st.builds(
    Link,
    st.lists(st.tuples(REFERENCES, POSITIONS), min_size=1, max_size=4).map(tuple),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    model=st.none() | NAMES,
    mode=st.sampled_from(["prompt", "chat"]),
    max_new_tokens=st.none() | st.integers(1, 512),
    temperature=st.none() | st.sampled_from([0.05, 0.8, 2.0]),
    top_p=st.none() | st.sampled_from([0.05, 0.95, 1.0]),
    seed=st.none() | st.integers(0, 10_000),
    greedy=st.booleans(),
    apart=st.booleans(),
)


def read(query: str) -> Link | None:
    return parse_link(parse_qs(query.removeprefix("?")))


@given(LINKS)
def test_what_is_written_is_read_back(link: Link) -> None:
    assert read(link.query()) == link


def test_a_link_can_be_read_by_people() -> None:
    query = Link((("sentiment", 1.5), ("me/mood@abc", -1.0)), "Tell me.", seed=3).query()
    assert query == "?use=sentiment:1.5&use=me/mood@abc:-1&prompt=Tell+me.&mode=prompt&seed=3"


def test_an_address_without_a_recipe_is_no_link() -> None:
    assert read("?__theme=dark&utm=1") is None
    assert read("") is None


@pytest.mark.parametrize(
    "use", ["../secrets:1", "/etc/passwd:1", "a/../../b:1", "~root/x:1", "C:\\x:1", "a b:1", "mood", "mood:nan",
            "mood:1e9", "mood:inf", "embedded/14#5:1", "a/b/c/d:1", ":1", "<img>:1"],
)  # fmt: skip
def test_nothing_but_a_name_or_a_hub_reference_at_a_strength_is_taken(use: str) -> None:
    with pytest.raises(UsageError, match="no artifact at a strength"):
        parse_link({"use": [use]})


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"use": ["a:1"], "length": ["100000"]}, "length is '100000'"),
        ({"use": ["a:1"], "seed": ["-1"]}, "seed is '-1'"),
        ({"use": ["a:1"], "temperature": ["hot"]}, "temperature is 'hot'"),
        ({"use": ["a:1"] * 5}, "5 artifacts at once"),
        ({"use": ["a:1"], "prompt": ["x" * (MAX_PROMPT + 1)]}, "characters"),
    ],
)
def test_what_is_out_of_range_is_named(query: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_link(query)


def test_what_only_its_owner_has_cannot_be_shared() -> None:
    check_shareable(["a", "u/b"], {"a": "released", "u/b": "pulled"}, "mine")
    with pytest.raises(UsageError, match=r"^c is on this page only.*publish it"):
        check_shareable(["a", "c"], {"a": "released", "c": "mine"}, "mine")
