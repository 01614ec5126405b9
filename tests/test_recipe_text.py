"""Recipes in words: what they mean, where they go wrong, and there and back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny, make_circuit, make_vector

from neurosteer.artifacts.combining import orthogonalise
from neurosteer.artifacts.recipe_text import Group, RecipeText, Term, parse_recipe
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.storage import save
from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.hub.references import look_up, look_up_all

MEANING: dict[str, tuple[list[Any], str]] = {
    "sentiment": ([Term("sentiment")], "all"),
    "sentiment:1.5 + formality:-0.5": ([Term("sentiment", 1.5), Term("formality", -0.5)], "all"),
    "  a:1  -  b:2 + c ": ([Term("a"), Term("b", -2.0), Term("c")], "all"),
    "-a": ([Term("a", -1.0)], "all"),
    "politeness-circuit:2": ([Term("politeness-circuit", 2.0)], "all"),
    "user/repo/joy@v2.1:1e-1": ([Term("user/repo/joy@v2.1", 0.1)], "all"),
    "https://huggingface.co/u/r/tree/main/joy:2": ([Term("https://huggingface.co/u/r/tree/main/joy", 2.0)], "all"),
    "hf://u/r@v1": ([Term("hf://u/r@v1")], "all"),
    '"./my folder":2 + "C:\\\\x"': ([Term("./my folder", 2.0), Term("C:\\x")], "all"),
    "refusal-circuit×0 + mood:1": ([Term("refusal-circuit", multiplier=0.0), Term("mood")], "all"),
    "circuit*0.25": ([Term("circuit", multiplier=0.25)], "all"),
    "embedded/14#1234:2 + embedded/14#7=8": ([Term("embedded/14#1234", 2.0), Term("embedded/14#7=8")], "all"),
    "orthogonal(a:1, b:-0.5) - c @generated": ([Group((Term("a"), Term("b", -0.5))), Term("c", -1.0)], "generated"),
    "a - orthogonal( b , c:2 )": ([Term("a"), Group((Term("b", -1.0), Term("c", -2.0)))], "all"),
    "a @first:8": ([Term("a")], "first:8"),
    "a:1 @last:4 ": ([Term("a")], "last:4"),
    "orthogonality:2": ([Term("orthogonality", 2.0)], "all"),
}  # fmt: skip


@pytest.mark.parametrize("text", MEANING)
def test_a_recipe_means_what_it_says(text: str) -> None:
    parts, positions = MEANING[text]
    assert parse_recipe(text) == RecipeText(tuple(parts), positions)


@pytest.mark.parametrize(
    ("text", "place", "wanted"),
    [
        ("", "at its end", "an artifact"),
        ("a +", "at its end", "an artifact"),
        ("a b", "character 2 (« b»)", "“ + ”"),
        ("a:x", "character 3 («x»)", "a strength, like a:1.5"),
        ("a:1.5.2", "character 3", "a strength"),
        ("a:nan", "character 3", "a strength"),
        ("a:1e999", "character 3", "a strength"),
        ("a:", "at its end", "a strength"),
        ("a×", "at its end", "a multiplier"),
        ("a + + b", "character 5 («+ b»)", "an artifact"),
        ("a, b", "character 2", "“ + ”"),
        ("orthogonal(a", "at its end", "“,” and another vector"),
        ("orthogonal()", "character 12 («)»)", "an artifact"),
        ("orthogonal(a, orthogonal(b, c))", "character 25", "“,” and another vector"),
        ("a @", "at its end", "first:N"),
        ("a @frist:8", "character 4 («frist:8»)", "first:N"),
        ("a @first:0", "character 4", "first:N"),
        ("a @prompt + b", "character 4", "nothing behind it"),
        ('"a', "character 1", "an artifact"),
        ("a+b", None, None),  # a name may hold a plus
        ("a:1+b", "character 3", "a strength"),
    ],
)
def test_what_cannot_be_read_is_pointed_at(text: str, place: str | None, wanted: str | None) -> None:
    if place is None:
        assert parse_recipe(text) == RecipeText((Term(text),))
        return
    with pytest.raises(UsageError) as refused:
        parse_recipe(text)
    said = str(refused.value)
    assert place in said and wanted is not None and wanted in said and "\n" not in said


def test_a_multiplier_has_no_sign_to_turn() -> None:
    with pytest.raises(UsageError, match="multiplier has no sign"):
        parse_recipe("a - b×0")


def test_a_recipe_has_bounds() -> None:
    with pytest.raises(UsageError, match="5,000 characters"):
        parse_recipe("a" * 5000)
    with pytest.raises(UsageError, match="at most 64"):
        parse_recipe(" + ".join(["a"] * 65))


references = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
finite = st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda value: float(f"{value:.12g}"))
terms = st.builds(Term, references, finite) | st.builds(Term, references, st.just(1.0), finite)
parts = terms | st.lists(terms, min_size=1, max_size=3).map(lambda some: Group(tuple(some)))
recipes = st.builds(
    RecipeText,
    st.lists(parts, min_size=1, max_size=4).map(tuple),
    st.sampled_from(["all", "prompt", "generated", "first:3", "last:12"]),
)


@given(recipes)
def test_there_and_back(recipe: RecipeText) -> None:
    if len(str(recipe)) <= 4000:
        assert parse_recipe(str(recipe)) == recipe


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        assert parse_recipe(str(parse_recipe(text))) == parse_recipe(text)
    except NeuroSteerError as error:
        assert "cannot be read" in str(error) or "sign to turn" in str(error)


# --- looked up -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    """Artifacts in folders, one of which has a name with spaces."""
    made = {"one": make_vector(seed=1), "two": make_vector(seed=2), "a circuit": make_circuit(operation="scale")}
    for name, artifact in made.items():
        save(artifact, tmp_path / name)
    return {"folder": tmp_path, **made}


def test_a_recipe_is_what_its_words_say(llama: Tiny, folders: dict[str, Any]) -> None:
    at = folders["folder"]
    found = look_up(f'{at}/one:2 - {at}/two:0.5 + "{at}/a circuit"×0.25 @generated')
    recipe = found.recipe(llama.lm)
    assert [(use.strength, use.multiplier) for use in recipe.uses] == [(2.0, None), (-0.5, None), (1.0, 0.25)]
    assert [use.artifact.name for use in recipe.uses] == [folders[name].name for name in ("one", "two", "a circuit")]
    assert found.positions == "generated" and found.model == folders["one"].model.name
    names = [f"{at}/one", f"{at}/two", f"{at}/a circuit"]
    again = look_up(str(RecipeText.of(recipe, names, "generated"))).recipe(llama.lm)
    assert [(use.strength, use.multiplier) for use in again.uses] == [(2.0, None), (-0.5, None), (1.0, 0.25)]


def test_a_sign_before_a_single_artifact_is_read(folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders["folder"])
    assert [use.strength for use in look_up("-one:2").uses] == [-2.0]
    monkeypatch.chdir(folders["folder"] / "one")  # itself an artifact, which nobody named
    with pytest.raises(NeuroSteerError, match="no artifact '5'"):
        look_up("5")


def test_orthogonal_takes_the_overlap_out_of_its_own_vectors_only(llama: Tiny, folders: dict[str, Any]) -> None:
    at = folders["folder"]
    found = look_up(f"{at}/one:3 + orthogonal({at}/one:1, {at}/two:2)").recipe(llama.lm)
    wanted = orthogonalise([folders["one"], folders["two"]])
    for use, artifact in zip(found.uses, [folders["one"], *wanted], strict=True):
        for layer, direction in artifact.directions.items():
            assert bool((use.artifact.directions[layer] - direction).abs().max() < 1e-5)  # type: ignore[attr-defined]
    assert [use.strength for use in found.uses] == [3.0, 1.0, 2.0]


def test_several_recipes_are_one(llama: Tiny, folders: dict[str, Any]) -> None:
    at = folders["folder"]
    found = look_up_all([f"{at}/one", f"orthogonal({at}/one, {at}/two) @prompt", f"{at}/a circuit"])
    assert found.groups == (range(1, 3),) and found.positions == "prompt" and len(found.uses) == 4
    with pytest.raises(UsageError, match="prompt and generated"):
        look_up_all([f"{at}/one + {at}/one @prompt", f"{at}/one + {at}/one @generated"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("embedded/14#3×2 + embedded/14#4", "not multiplied"), ("one×2", "strength, not a multiplier")],
)
def test_what_cannot_be_multiplied_is_refused(
    folders: dict[str, Any], monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(folders["folder"])
    with pytest.raises(UsageError, match=said):
        look_up(text)


def test_a_recipe_of_uses_is_written_by_their_names() -> None:
    recipe = Recipe((Use(make_vector(seed=1), -0.5), Use(make_circuit(operation="scale"), multiplier=0.0)))
    assert str(RecipeText.of(recipe)) == "vector-1:-0.5 + circuit-0×0"
