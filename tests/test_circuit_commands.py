"""The verbs about circuits, in this process; and the shell, driven through a pseudo-terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checks import Run, assert_one_clear_line
from tiny import Tiny, make_circuit, make_tiny, make_vector, word_tokenizer

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.storage import load, save
from neurosteer.circuits import (
    Selection,
    attribute,
    find_edges,
    find_universal,
    find_unspecific,
    measure_faithfulness,
)
from neurosteer.models.language_model import LanguageModel

PROMPT = "the cat runs over the"
ASKED = ("--prompt", PROMPT, "--target", "a", "--counterfactual", "t", "--raw", "--dtype", "float32")


def test_attribute_prints_the_promised_json_and_writes_the_circuit(
    run: Run, model_folder: Path, llama: Tiny, tmp_path: Path
) -> None:
    ran = run("attribute", *ASKED, "--model", model_folder, "--out", tmp_path / "c", "--top-k", "30", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert set(data) == {"metric", "target", "counterfactual", "neurons"}
    assert (data["target"], data["counterfactual"], len(data["neurons"])) == ("a", "t", 30)
    found = attribute(llama.lm, PROMPT, "a", "t", raw=True)
    assert data["metric"] == pytest.approx(found.prompts[0].metric, rel=1e-3)
    strongest = found.rows()[:30]
    assert [row[:3] for row in data["neurons"]] == [list(row[:3]) for row in strongest]
    assert [row[3] for row in data["neurons"]] == pytest.approx([row.score for row in strongest], rel=1e-3)
    circuit = load(tmp_path / "c")
    assert isinstance(circuit, NeuronCircuit)
    assert circuit.method == "relp" and circuit.size == 30


@pytest.mark.embedded
def test_universal_neurons_are_left_out_unless_they_are_to_be_kept(run: Run, embedded_lm: LanguageModel) -> None:
    universal = set(find_universal(embedded_lm).all)
    asked = ("--prompt", "The capital of France is", "--target", " Paris", "--raw", "--dtype", "float32")
    ran = [run("attribute", *asked, "--top-k", "2000", "--json", *extra) for extra in ((), ("--keep-universal",))]
    found = [{(row[0], row[2]) for row in json.loads(one.out)["neurons"]} for one in ran]
    assert not found[0] & universal
    assert len(found[1] & universal) > 5


def test_several_prompts_give_one_object_each_and_a_joint_circuit(run: Run, model_folder: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", PROMPT, "--prompt", "we sing", "--target", "a", "--target", "b", "--raw")
    options = ("--model", model_folder, "--aggregate", "union", "--per-layer", "3", "--out", tmp_path / "both")
    ran = run("attribute", *prompts, *options, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert [one["target"] for one in data["prompts"]] == ["a", "b"]
    circuit = load(tmp_path / "both")
    assert isinstance(circuit, NeuronCircuit) and 12 <= circuit.size <= 24
    text = run("attribute", *prompts, *options).out
    assert "'a'" in text and "'b'" in text and "both" in text


def test_a_target_of_several_tokens_is_said_to_be_cut(run: Run, model_folder: Path) -> None:
    ran = run("attribute", "--prompt", PROMPT, "--target", " zebra", "--model", model_folder, "--raw", "--json")
    assert ran.code == 0 and "first" in ran.err and "zebra" in ran.err
    assert json.loads(ran.out)["target"] != " zebra"


def test_edges_prints_the_promised_json_and_writes_pictures(
    run: Run, model_folder: Path, llama: Tiny, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--top-k", "40", "--targets", "5", "--out", tmp_path / "edges")
    ran = run("edges", *ASKED, *options, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert set(data) == {"edges"}
    graph = find_edges(llama.lm, attribute(llama.lm, PROMPT, "a", "t", raw=True), n_targets=5, select=None)
    by_ends = {(tuple(edge.source), tuple(edge.target)): edge.weight for edge in graph.edges}
    for source, target, weight in data["edges"]:
        assert weight == pytest.approx(by_ends[tuple(source), tuple(target)], rel=1e-2, abs=1e-5)
    assert json.loads((tmp_path / "edges" / "edges.json").read_text(encoding="utf-8")) == data
    assert (tmp_path / "edges" / "edges.dot").read_text(encoding="utf-8").startswith("digraph")
    assert "<html" in (tmp_path / "edges" / "edges.html").read_text(encoding="utf-8")
    assert len(json.loads(run("edges", *ASKED, *options, "--count", "3", "--json").out)["edges"]) == 3
    assert "strongest" in run("edges", *ASKED, *options).out


def test_faithfulness_prints_the_promised_json(run: Run, model_folder: Path, llama: Tiny) -> None:
    options = ("--model", model_folder, "--keep-universal", "--percents", "0,10,100")
    ran = run("faithfulness", *ASKED, *options, "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert set(data) == {"full", "empty", "rows"}
    assert all(set(row) == {"percent", "neurons", "faithfulness", "completeness"} for row in data["rows"])
    found = attribute(llama.lm, PROMPT, "a", "t", raw=True, keep_universal=True)
    wanted = measure_faithfulness(llama.lm, found, percents=[0, 10, 100], draws=0).data()
    assert data["full"] == pytest.approx(wanted["full"], rel=1e-3)
    assert [row["neurons"] for row in data["rows"]] == [row["neurons"] for row in wanted["rows"]]
    assert [row["faithfulness"] for row in data["rows"]] == pytest.approx(
        [row["faithfulness"] for row in wanted["rows"]], abs=1e-2
    )
    drawn = json.loads(run("faithfulness", *ASKED, *options, "--json", "--random", "2").out)
    assert {"area", "random_area"} <= set(drawn) and "random_faithfulness" in drawn["rows"][0]
    assert "Area under faithfulness" in run("faithfulness", *ASKED, *options).out


def test_decompose_shows_a_vectors_neurons_and_compares_a_circuit(
    run: Run, model_folder: Path, llama: Tiny, tmp_path: Path
) -> None:
    save(make_vector((1, 2), model=llama.lm.reference), tmp_path / "v")
    save(make_circuit(model=llama.lm.reference), tmp_path / "c")
    options = (tmp_path / "v", "--model", model_folder, "--dtype", "float32", "--top-k", "8")
    ran = run("decompose", *options, "--circuit", tmp_path / "c", "--out", tmp_path / "neurons", "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert (data["layer"], len(data["neurons"]), data["comparison"]["neurons"]) == (2, 8, 3)
    assert load(tmp_path / "neurons").method == "decomposition"
    assert "span" in run("decompose", *options).out


def test_mistakes_end_with_code_2_and_one_line_that_names_the_value(
    run: Run, model_folder: Path, llama: Tiny, tmp_path: Path
) -> None:
    model = ("--model", model_folder, "--raw")
    prompt = ("--prompt", PROMPT)
    other = make_tiny("llama", num_hidden_layers=6).lm.reference
    save(make_circuit(model=other), tmp_path / "other")
    save(make_vector(model=llama.lm.reference), tmp_path / "vector")
    for verb in ("attribute", "edges", "faithfulness"):
        assert_one_clear_line(run(verb, "--prompt", "", "--target", "a", *model), "empty")
        assert_one_clear_line(run(verb, *prompt, "--target", "", *model), "empty")
        assert_one_clear_line(run(verb, *prompt, "--target", "a", "--counterfactual", "a", *model), "same token")
        assert_one_clear_line(run(verb, *prompt, "--target", "a", "--metric", "odd", *model), "odd")
        assert_one_clear_line(run(verb, *prompt, "--target", "a", "--attention", "odd", *model), "odd")
    asked = (*prompt, "--target", "a")
    assert_one_clear_line(run("attribute", *asked, "--top-k", "0", *model), "top_k is 0")
    assert_one_clear_line(run("attribute", *asked, "--top-k", "5", "--share", "0.5", *model), "top_k and share")
    assert_one_clear_line(run("attribute", *asked, "--aggregate", "sum", *model), "sum")
    assert_one_clear_line(run("attribute", *asked, "--target", "b", *model), "2 targets", "1 prompts")
    assert_one_clear_line(run("attribute", *asked, "--specific", "--keep-universal", *model), "--specific")
    assert_one_clear_line(run("edges", *asked, "--targets", "0", *model), "n_targets is 0")
    assert_one_clear_line(run("edges", *asked, "--prompt", "we", *model), "2 prompts")
    assert_one_clear_line(run("faithfulness", *asked, "--percents", "1,two", *model), "1,two")
    assert_one_clear_line(run("faithfulness", *asked, "--ablation", "half", *model), "half")
    assert_one_clear_line(run("faithfulness", *asked, "--circuit", tmp_path / "other", *model), "6 layers")
    assert_one_clear_line(run("faithfulness", *asked, "--circuit", tmp_path / "vector", *model), "steering-vector")
    assert_one_clear_line(run("decompose", tmp_path / "other", "--model", model_folder), "neuron-circuit")
    assert_one_clear_line(run("decompose", tmp_path / "vector", "--layer", "3", "--model", model_folder), "no layer 3")
    assert_one_clear_line(run("repl", "--circuit", tmp_path / "other", *model), "6 layers")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert_one_clear_line(run("edges", *asked, "--out", tmp_path / "file", *model), "file")


def test_an_unknown_token_is_refused(run: Run, llama: Tiny, tmp_path: Path) -> None:
    llama.model.save_pretrained(tmp_path / "words")
    word_tokenizer().save_pretrained(tmp_path / "words")
    options = ("--prompt", "one two", "--model", tmp_path / "words", "--raw")
    assert_one_clear_line(run("attribute", *options, "--target", "elephant"), "elephant", "no token")


# --- the shell -------------------------------------------------------------------------------------------------------


def _heed_interrupts() -> None:
    """What runs in the background of a script ignores them, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`neurosteer repl` in a process of its own behind a pseudo-terminal."""

    def __init__(self, *arguments: object, cwd: Path, cache: Path) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "NEUROSTEER_CACHE": str(cache), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "neurosteer.cli", "repl", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
        os.close(slave)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What was printed up to `text`, which must come."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], 1.0)
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace").replace("\a", "") if ready else ""
            except OSError:
                pytest.fail(f"the shell ended before {text!r}: {self.seen[-2000:]}")
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen[-2000:]}"
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def do(self, line: str) -> str:
        """What a command prints."""
        self.type(line + "\n")
        shown = self.wait_for("neuron> ").replace("\r", "")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(model_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal("--model", model_folder, "--raw", "--dtype", "float32", cwd=tmp_path, cache=tmp_path / "cache")
    opened.wait_for("neuron> ")
    yield opened
    opened.end()


@pytest.mark.slow
def test_a_session_finds_changes_and_keeps_a_circuit(terminal: Terminal, llama: Tiny, tmp_path: Path) -> None:
    assert "There is no circuit" in terminal.do("top")
    assert "Probability" in terminal.do(f"prompt {PROMPT}")
    found = terminal.do('discover "a" "t"')
    wanted = attribute(llama.lm, PROMPT, "a", "t", raw=True)
    assert f"metric {wanted.prompts[0].metric:+.2f}" in found.replace("\n", " ") and "200 neurons" in found
    strongest = wanted.circuit()
    name = f"L{int(strongest.neuron_layers[0])}/N{int(strongest.neurons[0])}"
    assert name in terminal.do("top 1")
    assert "× 0" in terminal.do(f"ablate {name}") and "1 neuron ×" in terminal.do(f"ablate {name}")
    assert "10 neurons × 3" in terminal.do("amplify top10 3")
    assert "multiplier 1.5" in terminal.do("multiplier 1.5")
    assert "× 1.5" in terminal.do("amplify L1")
    rows = [line for line in terminal.do("sweep 0 1 2").splitlines() if re.match(r"\s+[012]\s+0\.", line)]
    assert len(rows) == 3
    assert "strongest of" in terminal.do("edges 3")
    assert "Weight in" in terminal.do("hubs 2")
    assert "Written to" in terminal.do("save kept")
    saved = load(tmp_path / "kept")
    assert isinstance(saved, NeuronCircuit) and torch.equal(saved.neurons, strongest.neurons)
    assert "circuit of" in terminal.do("contrast what a day | fine song | warm sun // bad song | cold rain")
    assert "circuit of 200 neurons, relp" in terminal.do("load kept")
    assert "multiplier: 1.5" in terminal.do("info")
    assert "discover [--specific]" in terminal.do("help")


@pytest.mark.slow
def test_commands_of_the_shell_take_the_options_of_the_verbs(terminal: Terminal, llama: Tiny, tmp_path: Path) -> None:
    terminal.do(f"prompt {PROMPT}")
    assert "30 neurons" in terminal.do('discover --top-k 30 --attention frozen "a" "t"')
    terminal.do("save kept")
    wanted = attribute(llama.lm, PROMPT, "a", "t", raw=True, attention="frozen").circuit(select=Selection("top_k", 30))
    kept = load(tmp_path / "kept")
    assert isinstance(kept, NeuronCircuit) and torch.equal(kept.neurons, wanted.neurons)
    assert (kept.parameters["attention"], kept.parameters["select"]) == ("frozen", ["top_k", 30])
    assert "strongest of" in terminal.do("edges --targets 2 3")
    assert "made for: 'the cat runs over the' → 'a' rather than 't'" in terminal.do("info")

    gone = {name: set(find(llama.lm).all) for name, find in (("", find_universal), ("--specific", find_unspecific))}
    assert len(gone["--specific"]) > len(gone[""])
    for option, left_out in gone.items():
        shown = terminal.do(f'discover {option} "a" "t"')
        assert f"{len(left_out)} universal neurons are left out" in shown if left_out else "left out" not in shown
        terminal.do(f"save circuit{option}")
        circuit = load(tmp_path / f"circuit{option}")
        assert isinstance(circuit, NeuronCircuit)
        assert not left_out & set(zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True))
    assert "left out" not in terminal.do('discover --keep-universal "a" "t"')
    assert "metric" in terminal.do('discover --metric logit --percent 1 "a"')

    texts = "what a day | it's fine // bad song | don't rain"
    assert "circuit of 9 neurons" in terminal.do(f"contrast --top-k 9 --rank difference {texts}")


@pytest.mark.slow
def test_mistakes_say_what_is_wrong_and_the_shell_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    save(make_circuit(model=make_tiny("llama", num_hidden_layers=6).lm.reference), tmp_path / "other")
    for line, word in (
        ("discover a", "no prompt"),
        ("nonsense", "no command 'nonsense'"),
        ("load nowhere", "nowhere"),
        ("load other", "6 layers"),
        (f"prompt {PROMPT}", "Probability"),
        ('discover "a" "a"', "same token"),
        ('discover "a', "quotation mark"),
        ("discover", "TARGET"),
        ("edges", "discover one first"),
        ("discover --specific --keep-universal a", "--specific leaves out"),
        ("discover --top-k 5 --share 0.5 a", "top_k and share"),
        ("discover --top-k many a", "'many'"),
        ("discover --metric odd a", "odd"),
        ("discover --nonsense a", "--nonsense; write help discover"),
        ("contrast --rank odd good | fine // bad | poor", "odd"),
        ("contrast --rank", "--rank: no such file"),
        ('discover "a" "t"', "circuit of"),
        ("edges --targets 0", "n_targets is 0"),
        ("ablate L9", "no layer 9"),
        ("ablate L1/N64", "no neuron 64"),
        ("ablate best", "top10"),
        ("sweep one", "one"),
        ("multiplier nan", "finite"),
        ("hubs many", "many"),
        ("", ""),
        ("info", "circuit: "),
    ):
        shown = terminal.do(line)
        assert word in shown and "Traceback" not in shown, (line, shown)


@pytest.mark.slow
def test_control_c_stops_the_command_or_the_line_and_not_the_shell(terminal: Terminal) -> None:
    terminal.do(f"prompt {PROMPT}")
    terminal.do('discover "a" "t"')
    many = " ".join(str(one / 1000) for one in range(3000))
    shown = ""
    for pause in (0.3, 0.1, 0.6, 0.2, 1.0):  # it may be over already, and Python loses what comes during a finaliser
        terminal.type(f"sweep {many[:3500]}\n")
        terminal.wait_for(many[3450:3500])
        time.sleep(pause)
        os.killpg(terminal.process.pid, signal.SIGINT)
        time.sleep(0.2)
        terminal.type("info\n")
        shown = terminal.wait_for("circuit: ")
        terminal.wait_for("neuron> ")
        if "Stopped." in shown:
            break
    assert "Stopped." in shown
    terminal.type("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.5)  # a signal between a key and Python's wait for the next is heeded at that one only
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.wait_for("neuron> ")
    assert "circuit: " in terminal.do("info")
    terminal.type("quit\n")
    assert terminal.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_tab_completes_commands_and_parts_and_history_outlives_the_shell(
    terminal: Terminal, model_folder: Path, tmp_path: Path
) -> None:
    terminal.type("disc\t")
    terminal.wait_for("discover")
    terminal.type(" --spec\t")
    terminal.wait_for("--specific")
    terminal.type("\x15")  # the line is dropped
    terminal.do(f"prompt {PROMPT}")
    terminal.do('discover "a" "t"')
    terminal.type("ablate to\t")
    terminal.wait_for("top")
    terminal.type("\x15")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0
    again = Terminal("--model", model_folder, cwd=tmp_path, cache=tmp_path / "cache")
    try:
        again.wait_for("neuron> ")
        again.type("\x1b[A\x1b[A")
        again.wait_for(f"prompt {PROMPT}")
    finally:
        again.end()
