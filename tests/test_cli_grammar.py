"""What the command line takes: help, choices, short and former options, standard input, where to write."""

import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import typer
from checks import Run, assert_one_clear_line, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Tiny, make_vector

from neurosteer import cli
from neurosteer.artifacts.circuit import CIRCUIT_OPERATIONS
from neurosteer.artifacts.storage import load, save
from neurosteer.circuits.checks.ablation import Ablation
from neurosteer.circuits.relp.attribution import Aggregate
from neurosteer.circuits.relp.linearised import Attention
from neurosteer.circuits.relp.scores import Metric
from neurosteer.cli import choices
from neurosteer.cli.grammar import flattened
from neurosteer.cli.inputs import given_prompts, read_prompts
from neurosteer.cli.options import ModelOptions, SamplingOptions
from neurosteer.cli.steer_commands import _cosines_text
from neurosteer.errors import UsageError
from neurosteer.examples.files import vectors_folder
from neurosteer.exporting.formats import FORMATS
from neurosteer.hub.searching import KINDS
from neurosteer.methods import METHODS, cna, sae
from neurosteer.models.language_model import Framing
from neurosteer.models.loading import DTYPES
from neurosteer.models.quantization import QUANTIZATIONS
from neurosteer.reading.request import Tokens
from neurosteer.version import VERSION

ROOT = Path(__file__).parent.parent
GROUP: Any = typer.main.get_command(cli.app)
VERBS: dict[str, Any] = {name: one for name, one in GROUP.commands.items() if name != "sae"}
VERBS |= {f"sae {name}": one for name, one in GROUP.commands["sae"].commands.items()}
HEAVY = ("torch", "transformers", "gradio", "sklearn", "huggingface_hub", "matplotlib", "rich", "numpy")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["-h"], 0), (["build", "--help"], 0), (["sae", "train", "-h"], 0), (["buidl"], 2),
     (["--version"], 0), (["steer", "--nonsense"], 2), (["build", "x", "--method", "magic"], 2)],
)  # fmt: skip
def test_help_and_wrong_words_are_answered_at_once_without_importing_what_is_heavy(words: list[str], code: int) -> None:
    program = (
        "import sys; from neurosteer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (ran.returncode, ran.stdout.splitlines()[-1]) == (code, "HEAVY []"), ran.stderr
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert busy < 0.75, busy  # of one core; half a second on an idle machine


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help_text_and_help_lists_it(run: Run, verb: str) -> None:
    shown = run(*verb.split(), "--help")
    assert shown.code == 0
    for option in VERBS[verb].params:
        assert option.help, option.name
        assert option.param_type_name == "argument" or option.opts[0] in shown.out
    assert "\nOutput:\n" in shown.out and "-q, --quiet" in shown.out


def test_help_lists_verbs_and_options_in_groups(run: Run) -> None:
    shown = run("--help").out
    assert shown.index("Make artifacts:") < shown.index("  build ") < shown.index("Steer:") < shown.index("  steer ")
    shown = run("build", "-h").out
    assert shown.index("With --method cna:") < shown.index("--skip-layers") < shown.index("With --method sae:")
    assert run().out == run("--help").out and run().code == 2


def test_the_readmes_command_lines_are_understood() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    written = [one for line in lines if line.startswith("neurosteer ") for one in line.split(" && ")]
    assert len(written) > 10
    for line in written:
        _, verb, *words = shlex.split(line, comments=True)
        if verb == "sae":
            verb = f"sae {words.pop(0)}"
        VERBS[verb].make_context(verb, words)  # raises for an option or a value that there is none of


def test_the_version_is_told(run: Run) -> None:
    assert run("--version") == (0, f"neurosteer {VERSION}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_choices_and_names(shell: str) -> None:
    def completed(line: str) -> str:
        asked = {"_NEUROSTEER_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "_TYPER_COMPLETE_ARGS": line}
        asked |= {"COMP_CWORD": str(len(line.split(" ")) - 1), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        return subprocess.run(
            [sys.executable, "-m", "neurosteer.cli"], capture_output=True, text=True, cwd=ROOT, env=os.environ | asked
        ).stdout

    assert "build" in completed("neurosteer bui")
    assert "--method" in completed("neurosteer build --me")
    assert "probe" in completed("neurosteer build x --method p")
    assert "formality" in completed("neurosteer steer --use form")


def test_choices_are_those_of_the_library() -> None:
    for ours, theirs in (
        (choices.Method, METHODS), (choices.Framing, get_args(Framing)), (choices.ReadTokens, get_args(Tokens)),
        (choices.Rank, dict.fromkeys((*cna.RANKS, *sae.RANKS))), (choices.Operation, CIRCUIT_OPERATIONS),
        (choices.Weight, sae.WEIGHTS), (choices.Sides, sae.SIDES), (choices.Dtype, DTYPES),
        (choices.Quantization, QUANTIZATIONS),
        (choices.Metric, get_args(Metric)),
        (choices.Attention, get_args(Attention)),
        (choices.Aggregate, get_args(Aggregate)), (choices.Ablation, get_args(Ablation)), (choices.Kind, KINDS),
        (choices.Format, FORMATS),
    ):  # fmt: skip
        assert set(get_args(ours)) == set(theirs), ours


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("build", "sentiment", "--method", "magic"), ["--method", "magic", "probe"]),
        (("build", "sentiment", "--framing", "odd"), ["odd", "answer"]),
        (("build", "sentiment", "--tokens", "first"), ["first", "mean"]),
        (("build", "sentiment", "--rank", "size"), ["size", "dprime"]),
        (("build", "sentiment", "--operation", "turn"), ["turn", "shift"]),
        (("build", "sentiment", "--weight", "odd"), ["odd", "target"]),
        (("build", "sentiment", "--dtype", "int3"), ["int3", "bfloat16"]),
        (("steer", "-u", "sentiment", "-p", "x", "--positions", "some"), ["some", "generated"]),
        (("steer", "-u", "sentiment", "-p", "x", "-n", "many"), ["--max-new-tokens", "many"]),
        (("attribute", "-p", "x", "-t", "y", "--metric", "odd"), ["odd", "logit"]),
        (("attribute", "-p", "x", "-t", "y", "--aggregate", "sum"), ["sum", "union"]),
        (("faithfulness", "-p", "x", "-t", "y", "--ablation", "half"), ["half", "paired"]),
        (("search", "--kind", "adapter"), ["adapter", "neuron-circuit"]),
        (("app", "--port", "99999"), ["--port", "99999", "65535"]),
        (("app", "--port", "0"), ["--port", "'0'"]),
    ],
)
def test_a_value_that_is_none_of_the_choices_is_refused_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: list[str]
) -> None:
    monkeypatch.setattr(ModelOptions, "load", lambda *_: pytest.fail("the model was loaded"))
    assert_one_clear_line(run(*arguments), *words)


def test_the_page_listens_where_the_environment_or_the_options_say(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    served: list[tuple[Any, ...]] = []
    page = SimpleNamespace(
        create_app=lambda model, *, host, trust_visitors: made.append((host, trust_visitors)),
        launch=lambda _, *, host, port, trust_visitors: served.append((host, port, trust_visitors)),
    )
    monkeypatch.setitem(sys.modules, "neurosteer.ui.page", page)
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    monkeypatch.delenv("GRADIO_SERVER_PORT", raising=False)
    assert run("app").code == 0
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7999")
    assert run("app").code == 0 and run("app", "--host", "::1", "--port", "8000", "--trust-visitors").code == 0
    assert served == [(None, None, None), ("0.0.0.0", 7999, None), ("::1", 8000, True)]
    assert made == [(host, trust) for host, _, trust in served], "what is offered depends on who can reach the page"
    monkeypatch.setenv("GRADIO_SERVER_PORT", "many")
    assert_one_clear_line(run("app"), "GRADIO_SERVER_PORT", "many")


# --- prompts and standard input --------------------------------------------------------------------------------------


@pytest.fixture
def vector(llama: Tiny, tmp_path: Path) -> Path:
    return save(make_vector((1, 2), model=llama.lm.reference), tmp_path / "mood")


def prompts_of(ran: Any) -> list[str]:
    assert ran.code == 0, ran.err
    return [row["prompt"] for row in json.loads(ran.out)["rows"]]


def test_a_prompt_is_read_from_standard_input(
    run: Run, monkeypatch: pytest.MonkeyPatch, model_folder: Path, vector: Path
) -> None:
    asked = ("steer", "-u", vector, "-m", model_folder, "-n", 1, "--json")
    for words, piped, prompts in (
        ((), "hi there\nyou\n", ["hi there\nyou"]),
        (("-p", "-"), "hi there\n", ["hi there"]),
        (("-p", "one", "-p", "-"), "two", ["one", "two"]),
        (("--prompts", "-"), "one\n\n two \n", ["one", "two"]),
        (("-p", "one"), "not read", ["one"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
        assert prompts_of(run(*asked, *words)) == prompts


def test_standard_input_without_a_prompt_or_asked_for_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    refused(lambda: given_prompts(None), UsageError, "no prompt", "--prompt")
    refused(lambda: given_prompts(["-"], Path("-")), UsageError, "once")
    refused(lambda: read_prompts(Path("-")), UsageError, "Standard input", "no prompt")
    refused(lambda: read_prompts(tmp_path / "nope.txt"), UsageError, "no such file", "nope.txt")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\xff")
    refused(lambda: read_prompts(tmp_path / "odd.txt"), UsageError, "odd.txt", "UTF-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    refused(lambda: given_prompts(["-"]), UsageError, "UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    refused(lambda: given_prompts(None), UsageError, "no prompt")


def test_temperature_0_is_greedy(run: Run, model_folder: Path, vector: Path) -> None:
    assert SamplingOptions(temperature=0).sampling().greedy and not SamplingOptions().sampling().greedy
    asked = ("steer", "-u", vector, "-m", model_folder, "-p", "hello there", "-n", 8, "--json")
    cold, greedy = (json.loads(run(*asked, *extra).out) for extra in (("--temperature", 0), ("--greedy",)))
    assert cold["rows"] == greedy["rows"]
    assert_one_clear_line(run(*asked, "--temperature", -1), "temperature", "-1")


def test_former_spellings_are_understood_and_not_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--tokens" not in run("sae", "train", "-h").out and "--held-out " not in run("sae", "train", "-h").out
    assert "--tokens" not in run("calibrate", "-h").out
    for verb, former, today in (
        ("sae train", "--tokens", "--train-tokens"),
        ("sae train", "--held-out", "--held-out-tokens"),
        ("calibrate", "--tokens", "--max-new-tokens"),
    ):
        for words in ((former, "odd"), (f"{former}=odd",)):
            assert_one_clear_line(run(*verb.split(), "x", *words), today, "odd")


# --- where to write --------------------------------------------------------------------------------------------------

SENTIMENT = vectors_folder() / "sentiment"
ASKED = ("-p", "x", "-t", "y")
USED = ("--use", "sentiment")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a model or asks the Hub has begun to work."""
    monkeypatch.setattr(ModelOptions, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("neurosteer.hub.pulling.pull_folder", lambda *_, **__: pytest.fail("the Hub was asked"))


WRITING = [
    ("build", "sentiment"), ("layers", "sentiment"), ("calibrate", "sentiment"), ("sweep", *USED),
    ("evaluate", *USED, "--judge", "refusal"), ("attribute", *ASKED), ("edges", *ASKED), ("decompose", "sentiment"),
    ("harness", *USED, "--tasks", "x"), ("sae", "train", "texts.txt", "--layers", "1"), ("pull", "user/mood"),
]  # fmt: skip
ARTIFACTS = ("build", "calibrate", "attribute", "decompose")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("words", WRITING, ids=lambda words: words[0])
def test_where_to_write_is_looked_at_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x", encoding="utf-8")
    Path("texts.txt").write_text("x\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in sorted(SENTIMENT.iterdir())}
    assert_one_clear_line(run(*words, "--out", "file/in/it"), "file")
    for inside in (SENTIMENT, SENTIMENT / "new", vectors_folder()):
        assert_one_clear_line(run(*words, "-o", inside), "never changed")
    assert {path: path.read_bytes() for path in sorted(SENTIMENT.iterdir())} == before
    assert {path.name for path in tmp_path.iterdir()} == {"file", "texts.txt"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "words", [one for one in WRITING if one[0] in ("build", "calibrate", "attribute", "decompose")]
)
def test_a_folder_with_something_else_in_it_takes_no_artifact(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "note.txt").write_text("x", encoding="utf-8")
    assert_one_clear_line(run(*words, "--out", tmp_path), "is no artifact", tmp_path.name)


@pytest.mark.usefixtures("no_model")
def test_released_artifacts_are_never_rewritten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(vectors_folder().parent)
    asked = ("evaluate", "--judge", "refusal", "--save")
    for named in ("sentiment", "sentiment:1", f"{SENTIMENT}:1"):
        assert_one_clear_line(run(*asked, "--use", named), "never changed")
    for named in ("sentiment", str(SENTIMENT)):
        assert_one_clear_line(run("calibrate", named), "never changed")
    assert_one_clear_line(run("build", "sentiment", "--out", "vectors/sentiment"), "never changed")
    assert_one_clear_line(run(*asked, "--use", "user/mood:1"), "local folder")


# --- names, notes, what is said --------------------------------------------------------------------------------------


def test_a_name_that_is_changed_is_said(run: Run, model_folder: Path, tmp_path: Path) -> None:
    asked = ("build", "gratitude", "-m", model_folder, "--layers", 1, "--no-calibrate", "--name", "bad name!")
    ran = run(*asked, "--out", tmp_path / "a")
    assert ran.code == 0 and "'bad name!' becomes bad-name;" in ran.err
    assert load(tmp_path / "a").name == "bad-name"
    quiet = run(*asked, "--out", tmp_path / "b", "-q")
    assert (quiet.code, quiet.err) == (0, "") and quiet.out
    loud = run(*asked, "--out", tmp_path / "c", "--verbose")
    assert "Starting" in loud.err.splitlines() and len(loud.err.splitlines()) > 3


def test_quiet_does_not_hide_mistakes_and_verbose_shows_where_a_fault_arose(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_clear_line(run("inspect", "nowhere", "--quiet"), "nowhere")

    def broken() -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("neurosteer.models.catalog.catalog", broken)
    assert run("models").code == 1 and run("models", "-q").err.count("boom") == 1
    with pytest.raises(ZeroDivisionError):
        run("models", "-v")
    assert run("models").code == 1, "what one call asked for is not the next one's"


def test_an_interrupt_ends_with_code_130_and_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neurosteer.models.catalog.catalog", interrupted)
    assert run("models") == (130, "", "neurosteer: Interrupted.\n")


def test_cosines_of_many_layers_are_put_in_short() -> None:
    assert _cosines_text({4: 0.5, 9: -0.25}) == "+0.50 at layer 4, -0.25 at layer 9"
    many = {layer: (layer - 12) / 20 for layer in range(24)}
    assert _cosines_text(many) == "-0.60 at layer 0, the most of 24 layers (-0.60 to +0.55)"


def test_fields_of_a_dataclass_become_options_by_themselves() -> None:
    seen: dict[str, Any] = {}

    def verb(*, count: int = 3, sampling: SamplingOptions) -> None: ...

    flat = flattened(verb, lambda **given: seen.update(given))
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(flat)
    app(["--count", "4", "--top-p", "0.5", "-s", "7"], standalone_mode=False)
    assert seen == {"count": 4, "sampling": SamplingOptions(top_p=0.5, seed=7)}


# --- anything whatever -----------------------------------------------------------------------------------------------

OFFLINE = sorted(set(VERBS) - {"app", "repl", "push", "pull", "search", "harness"})
WORDS = st.one_of(
    st.text(min_size=1, max_size=12).filter(lambda word: "\0" not in word),
    st.sampled_from(["1", "0", "-1", "0.5", "nan", "1e400", "-", "sentiment", "sentiment:1", "gratitude", "auto", "caa",
                     "mean", "9-3", "0-9999", "regex:(", "refusal", "x" * 300, "vectors/sentiment", "../..", "#",
                     "a#1"]),
)  # fmt: skip


RIGHT = {
    "examples": "gratitude", "use": "sentiment:1", "reference": "sentiment", "references": "formality", "prompt": "hi",
    "artifact": "sentiment", "target": " a", "texts": "texts.txt", "layers": "1", "folder": "new", "judge": "refusal",
    "circuit": "sentiment-circuit", "strengths": "0,1", "seed": "3", "samples": "2", "temperature": "0", "top_k": "5",
    "method": "pca", "positions": "prompt", "metric": "logit", "dtype": "float32", "name": "odd one",
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A verb with options that it has and their values: what is needed nearly always, and right values more often."""
    verb = draw(st.sampled_from(OFFLINE))
    words = verb.split()
    for one in VERBS[verb].params:
        is_taken = draw(st.integers(0, 19)) > 0 if one.required else draw(st.integers(0, 9)) == 0
        if not is_taken:
            continue
        if one.param_type_name == "option":
            words.append(draw(st.sampled_from(one.opts)))
        if not getattr(one, "is_flag", False):
            right = [RIGHT[one.name]] if one.name in RIGHT else []
            words += right if right and draw(st.integers(0, 3)) else draw(st.lists(WORDS, min_size=1, max_size=1))
    return words


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A folder of its own, no Hub and no model; the verbs that came as far as to load one."""
    loaded: list[str] = []

    def refuse(asked: ModelOptions, *_: Any) -> None:
        loaded.append("model")
        raise UsageError(f"There is no model {asked.model!r} in this test.")

    def away(*_: Any, **__: Any) -> None:
        raise UsageError("There is no Hub in this test.")

    (tmp_path / "texts.txt").write_text("one text\nanother\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelOptions, "load", refuse)
    monkeypatch.setattr("neurosteer.hub.pull", away)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    yield loaded
    assert len(loaded) > 10, "too few command lines were right to say anything"


@settings(
    max_examples=150, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(words=command_lines())
def test_no_words_whatever_bring_a_traceback(run: Run, apart: list[str], words: list[str]) -> None:
    ran = run(*words)
    assert ran.code in (0, 2), ran
    assert "Traceback" not in ran.err
    if ran.code == 2:
        last = ran.err.splitlines()[-1]
        assert last.startswith("neurosteer: ") and len(last) < 1000
        assert re.search(r"\w", last)
    if "--json" in words and ran.code == 0:
        assert isinstance(json.loads(ran.out), dict)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(min_size=1, max_size=12).filter(lambda word: "\0" not in word), max_size=5))
def test_no_text_at_all_brings_a_traceback(run: Run, words: list[str]) -> None:
    ran = run(*words)
    assert ran.code in (0, 2) and "Traceback" not in ran.err
