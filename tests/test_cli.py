"""The command line, in this process: exit codes, what is on stdout, one-line errors."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import Run, assert_one_clear_line

from neurosteer.artifacts.storage import load

POSITIVE = ["what a lovely day", "this is a fine song", "we like the warm sun", "a very good book"]
NEGATIVE = ["what an awful day", "this is a bad song", "we hate the cold rain", "a very poor book"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "mood.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, "positive"] for text in [*POSITIVE, POSITIVE[0], ""])
        writer.writerows([text, "negative"] for text in NEGATIVE)
    return path


@pytest.fixture
def vector(run: Run, model_folder: Path, examples: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "mood"
    ran = run(
        "build",
        examples,
        "--model",
        model_folder,
        "--dtype",
        "float32",
        "--layers",
        "1-2",
        "--no-calibrate",
        "--out",
        folder,
    )
    assert ran.code == 0, ran.err
    return folder


def test_build_prints_the_promised_json_and_writes_the_artifact(
    run: Run, model_folder: Path, examples: Path, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--layers", "2", "--out", tmp_path / "mood", "--json")
    ran = run("build", examples, "--method", "caa", *options)
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["artifact"] == str(tmp_path / "mood")
    assert (data["kind"], data["method"], data["layers"]) == ("steering-vector", "caa", [2])
    assert (data["n_positive"], data["n_negative"]) == (4, 4)
    assert data["dropped"] == {"blank": 1, "duplicate": 1}
    assert data["seconds"] > 0
    assert load(tmp_path / "mood").layers == [2]


@pytest.mark.parametrize("method", ["pca", "probe", "cna"])
def test_every_method_builds_from_the_command_line(
    run: Run, model_folder: Path, examples: Path, tmp_path: Path, method: str
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--out", tmp_path / method, "--json")
    extra = ("--top-k", "7", "--skip-layers", "0") if method == "cna" else ()
    ran = run("build", examples, "--method", method, *options, *extra)
    assert ran.code == 0, ran.err
    artifact = load(tmp_path / method)
    assert artifact.method == method
    if method == "cna":
        assert 0 not in artifact.layers


def test_steer_compare_puts_the_unsteered_row_at_strength_0_beside_the_steered_one(
    run: Run, model_folder: Path, vector: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--max-new-tokens", "5", "--greedy", "--json")
    ran = run("steer", "--use", f"{vector}:8", "--prompt", "hello there", "--compare", *options)
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert set(data) == {"model", "rows", "seconds"}
    assert [row["strength"] for row in data["rows"]] == [0.0, 8.0]
    assert all(set(row) == {"prompt", "strength", "sample", "text", "tokens"} for row in data["rows"])
    assert all(0 <= row["tokens"] <= 5 for row in data["rows"])
    assert data["rows"][0]["text"] != data["rows"][1]["text"]


def test_a_single_text_is_streamed_to_stdout_and_equals_the_json_one(
    run: Run, model_folder: Path, vector: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--max-new-tokens", "8", "--seed", "3")
    plain = run("steer", "--use", vector, "--prompt", "hello there", *options)
    data = json.loads(run("steer", "--use", vector, "--prompt", "hello there", *options, "--json").out)
    assert plain.code == 0, plain.err
    assert plain.out == data["rows"][0]["text"] + "\n"


def test_prompts_come_from_repeated_options_and_from_a_file(
    run: Run, model_folder: Path, vector: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffthird one\n\n fourth one \n", encoding="utf-8")
    options = ("--model", model_folder, "--max-new-tokens", "1", "--json", "--prompts", tmp_path / "prompts.txt")
    ran = run("steer", "--use", vector, "--prompt", "first one", "--prompt", "second one", *options)
    prompts = [row["prompt"] for row in json.loads(ran.out)["rows"]]
    assert prompts == ["first one", "second one", "third one", "fourth one"]


def test_sweep_takes_negative_strengths_with_a_space_or_an_equals_sign_and_writes_a_csv(
    run: Run, model_folder: Path, vector: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("one thing\nanother thing\n", encoding="utf-8")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    options = (*prompts, "--samples", "2", "--max-new-tokens", "3", "--model", model_folder)
    spaced = run("sweep", "--use", vector, "--strengths", "-1,0,1", *options, "--json", "--out", tmp_path / "sweep")
    joined = run("sweep", "--use", vector, "--strengths=-1,0,1", *options, "--json")
    assert spaced.code == 0, spaced.err
    rows = json.loads(spaced.out)["rows"]
    assert rows == json.loads(joined.out)["rows"]
    assert sorted({(row["strength"], row["prompt"], row["sample"]) for row in rows}) == sorted(
        (strength, prompt, sample)
        for strength in (-1.0, 0.0, 1.0)
        for prompt in ("one thing", "another thing")
        for sample in (0, 1)
    )
    with (tmp_path / "sweep" / "generations.csv").open(newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [row["text"] for row in written] == [row["text"] for row in rows]


def test_inspect_shows_what_the_artifact_is(run: Run, vector: Path) -> None:
    ran = run("inspect", vector)
    assert ran.code == 0
    assert "steering-vector" in ran.out and "4 positive, 4 negative" in ran.out
    data = json.loads(run("inspect", vector, "--json").out)
    assert data == json.loads((vector / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def other_vector(run: Run, model_folder: Path, examples: Path, tmp_path: Path) -> Path:
    """Of the same texts by another method, at layers 2 and 3."""
    folder = tmp_path / "other"
    options = ("--method", "probe", "--layers", "2-3", "--name", "other", "--no-calibrate", "--out", folder)
    ran = run("build", examples, "--model", model_folder, "--dtype", "float32", *options)
    assert ran.code == 0, ran.err
    return folder


def cosine_at(layer: int, *folders: Path) -> float:
    one, other = (load(folder).directions[layer].double() for folder in folders)  # type: ignore[union-attr]
    return float(one @ other / one.norm() / other.norm())


@pytest.mark.parametrize("verb", [("steer", "--prompt", "hello there"), ("sweep", "--strengths=0,1", "--prompts")])
def test_using_two_vectors_tells_their_cosines_and_orthogonalise_removes_their_overlap(
    run: Run, model_folder: Path, vector: Path, other_vector: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    (tmp_path / "prompts.txt").write_text("hello there\n", encoding="utf-8")
    verb = (*verb, str(tmp_path / "prompts.txt")) if verb[-1] == "--prompts" else verb
    options = ("--model", model_folder, "--dtype", "float32", "--max-new-tokens", "12", "--greedy")
    uses = ("--use", f"{vector}:4", "--use", f"{other_vector}:4")
    plain = run(*verb, *uses, *options, "--json")
    apart = run(*verb, *uses, *options, "--json", "--orthogonalise")
    assert plain.code == 0 and apart.code == 0, plain.err + apart.err
    expected = cosine_at(2, vector, other_vector)
    line = f"Cosine of mood-caa and other: {expected:+.2f} at layer 2."
    for ran in (plain, apart):
        data = json.loads(ran.out)
        assert set(data) == {"model", "rows", "seconds", "cosines"}
        assert data["cosines"] == [
            {"first": "mood-caa", "second": "other", "layer": 2, "cosine": pytest.approx(expected, abs=1e-6)}
        ]
        assert line in ran.err.splitlines()
    assert json.loads(plain.out)["rows"][-1]["text"] != json.loads(apart.out)["rows"][-1]["text"]
    text = run(*verb, *uses, *options)
    assert line in text.err.splitlines() and "Cosine" not in text.out


def test_one_vector_has_no_cosines_and_the_same_text_orthogonalised(run: Run, model_folder: Path, vector: Path) -> None:
    options = ("--model", model_folder, "--prompt", "x", "--max-new-tokens", "4", "--greedy", "--json")
    plain, apart = (run("steer", "--use", vector, *options, *extra) for extra in ((), ("--orthogonalise",)))
    first, second = json.loads(plain.out), json.loads(apart.out)
    assert "cosines" not in first and first["rows"] == second["rows"]
    assert "Cosine" not in plain.err


def test_the_same_vector_twice_cannot_be_orthogonalised(run: Run, model_folder: Path, vector: Path) -> None:
    options = ("--model", model_folder, "--prompt", "x", "--orthogonalise")
    ran = run("steer", "--use", vector, "--use", f"{vector}:2", *options)
    assert_one_clear_line(ran, "mood-caa", "layer 1", "cosine +1.0000")


def test_a_recipe_in_words_steers_as_its_parts_do(
    run: Run, model_folder: Path, vector: Path, other_vector: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--prompt", "hello there", "--json")
    options = (*options, "--max-new-tokens", "6")
    uses = ("--use", f"{vector}:6", "--use", f"{other_vector}:-3", "--positions", "prompt")
    in_words = ("--use", f"{vector}:6 - {other_vector}:3 @prompt")
    apart, together = (run("steer", *some, *options) for some in (uses, in_words))
    assert apart.code == together.code == 0, apart.err + together.err
    texts = [[row["text"] for row in json.loads(ran.out)["rows"]] for ran in (apart, together)]
    assert texts[0] == texts[1]
    first = run("steer", "--use", f"{vector}:6", "--positions", "first:2", *options)
    assert first.code == 0, first.err


def test_mistakes_in_recipes_are_one_line_each(run: Run, vector: Path) -> None:
    both = run("steer", "--use", f"{vector} @prompt", "--positions", "generated", "--prompt", "x")
    assert_one_clear_line(both, "@prompt", "generated")
    assert_one_clear_line(run("evaluate", "--use", f"{vector} @prompt", "--judge", "refusal"), "@prompt", "all tokens")
    assert_one_clear_line(run("steer", "--use", f"{vector}:1 +", "--prompt", "x"), "at its end", "an artifact")
    odd = run("steer", "--use", vector, "--positions", "frist:2", "--prompt", "x")
    assert_one_clear_line(odd, "frist:2", "first:N")


def test_inspect_of_several_shows_each_and_their_cosines(
    run: Run, model_folder: Path, examples: Path, vector: Path, other_vector: Path, tmp_path: Path
) -> None:
    built = run(
        "build", examples, "--model", model_folder, "--method", "cna", "--layers", "2-3", "--out", tmp_path / "circuit"
    )
    assert built.code == 0, built.err
    expected = cosine_at(2, vector, other_vector)
    ran = run("inspect", vector, tmp_path / "circuit", other_vector)
    assert ran.code == 0, ran.err
    assert ran.out.count("strength: ") == 3
    table = [line.split() for line in ran.out.splitlines()[-2:]]
    assert table == [["First", "Second", "Layer", "Cosine"], ["mood-caa", "other", "2", f"{expected:+.3f}"]]
    data = json.loads(run("inspect", vector, tmp_path / "circuit", other_vector, "--json").out)
    folders = (vector, tmp_path / "circuit", other_vector)
    assert set(data) == {"artifacts", "cosines"}
    assert data["artifacts"] == [json.loads((one / "config.json").read_text(encoding="utf-8")) for one in folders]
    assert data["cosines"] == [
        {"first": "mood-caa", "second": "other", "layer": 2, "cosine": pytest.approx(expected, abs=1e-6)}
    ]
    assert "share a layer" in run("inspect", vector, tmp_path / "circuit").out
    assert_one_clear_line(run("inspect", vector, tmp_path / "none"), "none")


def test_layers_shows_figures_for_every_layer_as_a_table_as_json_and_in_files(
    run: Run, model_folder: Path, examples: Path, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--framing", "raw")
    ran = run("layers", examples, *options, "--out", tmp_path / "view", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    own = ["effect", "effect_error", "damage", "kl", "kl_down"]
    figures = ["layer", "separation", *own, *(f"random_{key}" for key in own)]
    assert [list(row) for row in data["layers"]] == [figures] * 4
    assert [row["layer"] for row in data["layers"]] == [0, 1, 2, 3]
    assert (data["method"], data["framing"], data["n_held_out"]) == ("caa", "raw", [1, 1])
    near = [row for row in data["layers"] if max(row["kl"], row["kl_down"]) <= 1.15 * data["target_kl"]]
    assert data["best"]["effect"] == max(near or data["layers"], key=lambda row: row["effect"])["layer"]
    assert data["files"] == [str(tmp_path / "view" / name) for name in ("layers.csv", "layers.html")]
    with (tmp_path / "view" / "layers.csv").open(newline="", encoding="utf-8") as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == data["layers"]
    table = run("layers", examples, *options, "--layers", "1-2")
    assert table.code == 0, table.err
    lines = [line.replace("*", "").split() for line in table.out.splitlines()]
    assert lines[0][:4] == ["Layer", "Separation", "Effect", "Damage"]
    for line, row in zip(lines[1:3], data["layers"][1:3], strict=True):
        others = (f"{row[key]:+.3f}" for key in ("damage", "random_effect", "random_damage"))
        effect = [f"{row['effect']:+.3f}", "±", f"{row['effect_error']:.3f}"]
        assert line == [str(row["layer"]), f"{row['separation']:.3f}", *effect, *others]
    assert "nats per token" in table.out and "at 1 nats of KL" in table.out and "best of 2" in table.out


def test_layers_names_what_it_cannot_do(run: Run, model_folder: Path, examples: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for options, word in (
        (("--layers", "77"), "77"),
        (("--layers", "auto"), "auto"),
        (("--method", "magic"), "magic"),
        (("--framing", "odd"), "odd"),
        (("--layers", "1", "--framing", "raw", "--out", tmp_path / "file"), "file"),
    ):
        assert_one_clear_line(run("layers", examples, "--model", model_folder, *options), word)


def test_models_lists_the_default_first_and_as_json(run: Run) -> None:
    data = json.loads(run("models", "--json").out)
    assert data["models"][0]["name"] == data["default"] == "SmolLM2-135M-Instruct"
    assert "SmolLM2-135M-Instruct (default)" in run("models").out


def test_mistakes_end_with_code_2_and_one_line_that_names_the_value(
    run: Run, model_folder: Path, examples: Path, vector: Path, tmp_path: Path
) -> None:
    model = ("--model", model_folder)
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\ngood,positive\nodd,maybe\n", encoding="utf-8")
    assert_one_clear_line(run("build", tmp_path / "none.csv", *model), "none.csv")
    assert_one_clear_line(run("build", bad, *model), "bad.csv", "row 3", "maybe")
    assert_one_clear_line(run("build", examples, *model, "--method", "magic"), "magic", "caa")
    assert_one_clear_line(run("build", examples, *model, "--layers", "9-3"), "9-3")
    assert_one_clear_line(run("build", examples, *model, "--layers", "77"), "77")
    assert_one_clear_line(run("build", examples, *model, "--framing", "odd"), "odd", "answer")
    assert_one_clear_line(run("build", examples, *model, "--tokens", "first"), "first", "mean")
    assert_one_clear_line(run("build", examples, *model, "--rank", "write"), "rank")
    assert_one_clear_line(run("build", examples, *model, "--method", "cna", "--rank", "size"), "size", "difference")
    assert_one_clear_line(run("build", examples, *model, "--dtype", "int3"), "int3")
    assert_one_clear_line(run("build", examples, "--model", "no such model"), "no such model")
    assert_one_clear_line(run("steer", "--use", "nothing-here", "--prompt", "x", *model), "nothing-here")
    assert_one_clear_line(run("steer", "--use", f"{vector}:strong", "--prompt", "x", *model), "strong")
    assert_one_clear_line(run("steer", "--use", f"{vector}:nan", "--prompt", "x", *model), "nan")
    assert_one_clear_line(run("steer", "--use", vector, *model), "--prompt")
    assert_one_clear_line(run("steer", "--use", vector, "--prompt", "", *model), "empty")
    assert_one_clear_line(run("steer", "--use", vector, "--prompt", "x", "--temperature", "-1", *model), "temperature")
    assert_one_clear_line(run("steer", "--use", vector, "--prompt", "x", "--positions", "some", *model), "some")
    assert_one_clear_line(run("steer", "--use", vector, "--prompts", tmp_path / "no.txt", *model), "no.txt")
    assert_one_clear_line(run("sweep", "--use", vector, "--strengths", "1,two", *model), "1,two")
    assert_one_clear_line(run("inspect", tmp_path / "none"), "none")


def test_an_artifact_of_another_model_is_refused_by_name(
    run: Run, model_folder: Path, vector: Path, tmp_path: Path
) -> None:
    config = json.loads((vector / "config.json").read_text(encoding="utf-8"))
    config["model"]["n_layers"] += 1
    (vector / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ran = run("steer", "--use", vector, "--prompt", "x", "--model", model_folder)
    assert_one_clear_line(ran, "mood", "layers")


def test_a_fault_of_ours_ends_with_code_1_and_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("neurosteer.models.catalog.catalog", broken)
    ran = run("models")
    assert ran.code == 1
    assert "boom" in ran.err and "Traceback" not in ran.err


def test_importing_the_package_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import neurosteer as ns; s = time.perf_counter() - t; "
        "print(s, [m for m in ('torch', 'transformers', 'gradio', 'sklearn', 'huggingface_hub') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = re.fullmatch(r"(\S+) (.*)\n", printed).groups()  # type: ignore[union-attr]
    assert float(seconds) < 2 and heavy == "[]"


def test_every_public_name_can_be_had() -> None:
    import neurosteer

    for name in dir(neurosteer):
        assert getattr(neurosteer, name) is not None
    with pytest.raises(AttributeError):
        getattr(neurosteer, "nothing_of_that_name")  # noqa: B009


@pytest.mark.embedded
def test_steering_the_embedded_model_from_the_command_line_changes_what_it_writes(
    run: Run, embedded_lm: object, tmp_path: Path
) -> None:
    built = run("build", "sentiment", "--layers", "16", "--out", tmp_path / "mood", "--json")
    assert built.code == 0, built.err
    options = ("--max-new-tokens", "12", "--greedy", "--json", "--compare")
    ran = run("steer", "--use", f"{tmp_path / 'mood'}:1", "--prompt", "The film that we saw was", *options)
    texts = [row["text"] for row in json.loads(ran.out)["rows"]]
    assert len(texts) == 2 and texts[0] != texts[1]
    assert torch.is_grad_enabled()
