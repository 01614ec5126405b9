"""Every family of `families`: what works is exact, and what does not is refused in one line."""

import pytest
from families import FAMILIES
from family_check import OK, FamilyRow, check_family

NO_VECTORS = {"Gemma 3n": "streams", "RecurrentGemma": "padding", "RWKV": "padding"}
"""Families that cannot be steered at all, and what the line that says so speaks of."""
NO_NEURONS = ("mixture of experts", "told apart by token")
NO_RULE = ("is of an unknown kind", "no rule is known", *NO_NEURONS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_works_exactly_or_says_in_one_line_why_not(family: str) -> None:
    row = check_family(family)
    if family in NO_VECTORS:
        assert NO_VECTORS[family] in f"{row.load} {row.vector}"
        return
    assert (row.load, row.vector, row.exact, row.token_kl) == (OK, OK, OK, OK)
    assert_refused(row, "circuit", NO_NEURONS)
    assert_refused(row, "relp", NO_RULE)


def assert_refused(row: FamilyRow, what: str, why: tuple[str, ...]) -> None:
    line = row.refusals.get(what)
    assert line is None or (any(reason in line for reason in why) and line.startswith(row.family) and "\n" not in line)


def test_there_are_at_least_sixty_families_and_all_but_three_can_be_steered() -> None:
    assert len(FAMILIES) - len(NO_VECTORS) >= 60
