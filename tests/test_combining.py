"""Overlap between vectors and its removal, against eigenvectors by Jacobi rotations in loops and against hooks."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import D_MODEL, REFERENCE, Tiny, Writes, ablating, clamping, make_circuit, make_vector, naive_logits

from neurosteer.artifacts.combining import Overlap, cosines, orthogonalise, orthogonalised
from neurosteer.artifacts.features import Feature
from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import MismatchError, UsageError
from neurosteer.steering.plans import applied, compile_plan


def overlapping(count: int, *, seed: int, shared: float = 0.7, layers: Sequence[int] = (1,)) -> list[SteeringVector]:
    """Vectors of different length that have a direction in common; their cosines are about shared² / (1 + shared²)."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(D_MODEL)
    found = []
    for number in range(count):
        rows = {
            layer: torch.tensor((shared * common + rng.standard_normal(D_MODEL)) * 10.0 ** rng.integers(-3, 4)).float()
            for layer in layers
        }
        found.append(make_vector(layers, name=f"v{number}", directions=rows, norms=dict.fromkeys(layers, 50.0)))
    return found


def units(vectors: Sequence[SteeringVector], layer: int) -> np.ndarray:
    """Unit directions as rows `[k, d_model]`, float64."""
    rows = np.stack([vector.directions[layer].numpy().astype(np.float64) for vector in vectors])
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def jacobi(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (columns) of a symmetric matrix, one plane rotation after the other."""
    left, vectors = matrix.copy(), np.eye(len(matrix))
    for _ in range(60):
        for p in range(len(left)):
            for q in range(p + 1, len(left)):
                angle = 0.5 * math.atan2(2 * left[p, q], left[q, q] - left[p, p])
                turn = np.eye(len(left))
                turn[p, p] = turn[q, q] = math.cos(angle)
                turn[p, q], turn[q, p] = math.sin(angle), -math.sin(angle)
                left, vectors = turn.T @ left @ turn, vectors @ turn
    return np.diag(left), vectors


def lowdin(rows: np.ndarray) -> np.ndarray:
    """The rows times the inverse square root of the matrix of their products, in loops."""
    count = len(rows)
    products = np.array([[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows])
    values, vectors = jacobi(products)
    result = np.zeros_like(rows)
    for i in range(count):
        for j in range(count):
            root = sum(vectors[i, e] * vectors[j, e] / math.sqrt(values[e]) for e in range(count))
            result[i] += root * rows[j]
    return result


# --- what comes out --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(2, 6), seed=st.integers(0, 10_000), shared=st.floats(0.0, 1.5))
def test_directions_become_orthogonal_and_keep_their_lengths(count: int, seed: int, shared: float) -> None:
    vectors = overlapping(count, seed=seed, shared=shared)
    found = orthogonalise(vectors)
    rows = units(found, 1)
    for i in range(count):
        for j in range(i):
            assert abs(float(rows[i] @ rows[j])) < 1e-6
        length, before = (float(vector.directions[1].double().norm()) for vector in (found[i], vectors[i]))
        assert length == pytest.approx(before, rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(count=st.integers(2, 6), seed=st.integers(0, 10_000), shared=st.floats(0.0, 1.5))
def test_they_equal_a_naive_inverse_square_root(count: int, seed: int, shared: float) -> None:
    vectors = overlapping(count, seed=seed, shared=shared)
    np.testing.assert_allclose(units(orthogonalise(vectors), 1), lowdin(units(vectors, 1)), atol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_the_order_of_the_vectors_does_not_matter(order: list[int], seed: int) -> None:
    vectors = overlapping(4, seed=seed)
    found = orthogonalise(vectors)
    shuffled = orthogonalise([vectors[place] for place in order])
    for place, vector in zip(order, shuffled, strict=True):
        torch.testing.assert_close(vector.directions[1], found[place].directions[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_orthonormal_set_is_nearer_to_the_given_directions(seed: int) -> None:
    vectors = overlapping(3, seed=seed, shared=1.0)
    given_, found = units(vectors, 1), units(orthogonalise(vectors), 1)
    distance = np.linalg.norm(given_ - found)
    rng = np.random.default_rng(seed)
    for spread in (1e-3, 1e-2, 0.1, 1.0, 100.0):
        for start in (given_, found):
            for _ in range(20):
                other, triangle = np.linalg.qr((start + spread * rng.standard_normal(start.shape)).T)
                other = (other * np.sign(np.diag(triangle))).T
                assert np.linalg.norm(given_ - other) >= distance - 1e-6


def test_turning_one_vector_round_turns_only_its_own_result_round() -> None:
    one, other, third = overlapping(3, seed=3)
    plain, turned = orthogonalise([one, other, third]), orthogonalise([one, -other, third])
    for sign, before, after in zip((1, -1, 1), plain, turned, strict=True):
        torch.testing.assert_close(after.directions[1], sign * before.directions[1], rtol=1e-5, atol=1e-7)


def test_vectors_without_overlap_stay_where_they_are() -> None:
    rows = torch.linalg.qr(torch.randn(D_MODEL, 3, generator=torch.Generator().manual_seed(0)))[0].T * 7
    vectors = [make_vector((2,), name=f"v{place}", directions={2: row.clone()}) for place, row in enumerate(rows)]
    for before, after in zip(vectors, orthogonalise(vectors), strict=True):
        torch.testing.assert_close(after.directions[2], before.directions[2])


# --- what stays ------------------------------------------------------------------------------------------------------


def test_layers_that_are_not_shared_stay_as_they_are() -> None:
    one, other = make_vector((0, 1, 2), seed=1), make_vector((2, 3), seed=2)
    apart = make_vector((3,), seed=3)
    found = orthogonalise([one, other])
    assert all(torch.equal(found[0].directions[layer], one.directions[layer]) for layer in (0, 1))
    assert torch.equal(found[1].directions[3], other.directions[3])
    assert not torch.equal(found[0].directions[2], one.directions[2])
    assert [vector.layers for vector in found] == [[0, 1, 2], [2, 3]]
    assert orthogonalise([one, apart]) == [one, apart]  # the same objects: artifacts are equal to themselves only
    assert orthogonalise([one]) == [one] and orthogonalise([]) == []


def test_each_says_what_it_was_orthogonalised_against_and_loses_what_was_measured_of_the_old_direction() -> None:
    feature = Feature(1, 5, 1.0, 1.0, (0.5, 0.1), (1.0, 1.0))
    one = make_vector(
        (1, 2),
        seed=1,
        parameters={"penalty": 2},
        receipts=(Receipt({"effect": 1}),),
        features=(feature, replace(feature, layer=2)),
        calibration=Calibration(0.7, measured=True),
    )
    other, third, elsewhere = make_vector((2,), seed=2), make_vector((2, 3), seed=3), make_vector((0,), seed=4)
    found = orthogonalise([one, other, elsewhere, third])
    assert found[0].parameters == {"penalty": 2, "orthogonalised_against": ["vector-2", "vector-3"]}
    assert found[1].parameters == {"orthogonalised_against": ["vector-1", "vector-3"]}
    assert found[0].receipts == () and one.receipts
    assert found[0].features == (feature,)
    assert found[2] is elsewhere
    for before, after in zip((one, other, elsewhere, third), found, strict=True):
        assert (after.name, after.method, after.norms) == (before.name, before.method, before.norms)
        assert (after.calibration, after.provenance) == (before.calibration.unmeasured(), before.provenance)
        assert after.calibration.amount == before.calibration.amount and not after.calibration.measured


def test_the_vectors_given_are_not_changed() -> None:
    vectors = overlapping(2, seed=0)
    before = [vector.directions[1].clone() for vector in vectors]
    orthogonalise(vectors)
    assert all(torch.equal(vector.directions[1], kept) for vector, kept in zip(vectors, before, strict=True))


def test_vectors_that_are_projected_out_or_clamped_are_left_alone_and_leave_others_alone() -> None:
    adding, out, held = make_vector((1, 2), seed=1), ablating((1, 2), seed=2), clamping((1, 2), seed=3)
    assert orthogonalise([adding, out, held]) == [adding, out, held]


def test_in_a_recipe_only_vectors_that_are_added_change_and_strengths_stay() -> None:
    one, other = make_vector((1, 2), seed=1), make_vector((2, 3), seed=2)
    out, circuit = ablating((2,), seed=3), make_circuit(seed=4)
    recipe = Recipe.of((one, 1.5), (circuit, -2.0), (out, 1.0), (other, 0.0))
    found = orthogonalised(recipe)
    expected = orthogonalise([one, other])
    assert [use.strength for use in found.uses] == [1.5, -2.0, 1.0, 0.0]
    assert found.uses[1] == recipe.uses[1] and found.uses[2] == recipe.uses[2]
    for place, vector in zip((0, 3), expected, strict=True):
        artifact = found.uses[place].artifact
        assert isinstance(artifact, SteeringVector)
        assert all(torch.equal(artifact.directions[layer], vector.directions[layer]) for layer in vector.layers)
    assert orthogonalised(Recipe()) == Recipe()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_two_directions_in_one_line_are_refused_with_their_names_the_layer_and_the_cosine(sign: float) -> None:
    one = make_vector((1, 2), seed=1)
    near = one.directions[2] * sign * 3 + 0.01 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    other = make_vector((2,), name="other", directions={2: near})
    apart = make_vector((2,), seed=5, name="apart")
    with pytest.raises(UsageError) as caught:
        orthogonalise([apart, one, other])
    message = str(caught.value)
    cosine = float(units([one], 2)[0] @ units([other], 2)[0])
    assert "'vector-1'" in message and "'other'" in message and "apart" not in message
    assert "layer 2" in message and f"{cosine:+.4f}" in message and "\n" not in message
    with pytest.raises(UsageError, match="'vector-1' and 'vector-1'"):
        orthogonalised(Recipe.of((one, 1.0), (one, 0.5)))


def test_three_directions_in_a_plane_are_refused_though_no_two_are_in_line() -> None:
    rows = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(1))
    given_ = {"first": rows[0], "second": rows[1], "third": rows[0] / 2 - rows[1]}
    vectors = [make_vector((1,), name=name, directions={1: row}) for name, row in given_.items()]
    apart = make_vector((1,), seed=9, name="apart")
    with pytest.raises(UsageError, match=r"layer 1 .*'first', 'second', 'third' .*sum of the others") as caught:
        orthogonalise([*vectors, apart])
    assert "apart" not in str(caught.value)


def test_a_strong_overlap_is_not_yet_refused() -> None:
    one = make_vector((1,), seed=1)
    other = make_vector((1,), seed=2)
    mixed = make_vector((1,), name="mixed", directions={1: one.directions[1] + 0.2 * other.directions[1]})
    assert 0.95 < cosines([one, mixed])[0].cosine < 0.99
    assert abs(cosines(orthogonalise([one, mixed]))[0].cosine) < 1e-6


def test_vectors_of_models_of_different_shape_are_refused() -> None:
    deeper = replace(REFERENCE, n_layers=REFERENCE.n_layers + 1, name="tiny/deeper")
    one, other = make_vector((1,), seed=1), make_vector((1,), seed=2, model=deeper)
    for call in (orthogonalise, cosines):
        with pytest.raises(MismatchError, match=r"vector-2.*tiny/deeper.*tiny/any"):
            call([one, other])
    with pytest.raises(MismatchError):
        orthogonalised(Recipe.of(one, other))


# --- cosines ---------------------------------------------------------------------------------------------------------


def test_cosines_are_those_of_numpy_for_each_pair_at_each_shared_layer() -> None:
    vectors = [make_vector((0, 1, 2), seed=1), make_vector((1, 2), seed=2), make_vector((2, 3), seed=3)]
    found = cosines(vectors)
    expected = [(0, 1, 1), (0, 1, 2), (0, 2, 2), (1, 2, 2)]
    assert [(one.first, one.second, one.layer) for one in found] == [
        (vectors[i].name, vectors[j].name, layer) for i, j, layer in expected
    ]
    for overlap, (i, j, layer) in zip(found, expected, strict=True):
        x, y = (vectors[place].directions[layer].numpy().astype(np.float64) for place in (i, j))
        assert overlap.cosine == pytest.approx(float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)), abs=1e-12)


def test_cosines_of_a_recipe_are_of_its_vectors_whatever_their_strength_and_without_circuits() -> None:
    one, other, circuit = make_vector((1,), seed=1), ablating((1,), seed=2), make_circuit()
    (found,) = cosines(Recipe.of((one, -2.0), (circuit, 1.0), (other, 1.0)))
    assert [found] == cosines([one, circuit, other])
    (same,) = cosines([one, one])
    assert same == Overlap("vector-1", "vector-1", 1, same.cosine) and same.cosine == pytest.approx(1.0)
    assert cosines([circuit]) == cosines([one]) == cosines(Recipe()) == []


# --- steering --------------------------------------------------------------------------------------------------------


def test_steering_with_it_adds_the_orthogonal_pushes(each: Tiny) -> None:
    one, other = (
        replace(vector, model=each.lm.reference, calibration=Calibration(dose))
        for vector, dose in zip(overlapping(2, seed=4, layers=(1, 2)), (0.3, 0.5), strict=True)
    )
    strengths = (1.0, -0.8)
    writes = Writes()
    for layer in (1, 2):
        rows = lowdin(units([one, other], layer))
        for row, strength, vector in zip(rows, strengths, (one, other), strict=True):
            dose = strength * vector.calibration.amount * vector.norms[layer] / 2
            writes.pushes.append((layer, torch.tensor(row * dose).float()))
    ids = each.lm.prompt_ids("the cat sings over the river, again.")
    recipe = orthogonalised(Recipe.of((one, strengths[0]), (other, strengths[1])))
    with torch.no_grad(), applied(each.lm, compile_plan(each.lm, [recipe])):
        found = each.model(torch.tensor([ids]), use_cache=False).logits[0]
    expected = naive_logits(each, ids, writes)
    plain = naive_logits(each, ids, Writes())
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 0.05 * float(expected.abs().max())
