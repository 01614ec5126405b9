"""Several processes on one job come to what one comes to, and each does its share."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import shared_work
import tiny as tinies
import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.artifacts.storage import load

ROOT = Path(__file__).parent.parent
VERBS = ("caa", "cna", "probe", "saes", "features", "receipt", "answers")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(command: Sequence[str], count: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """The command in `count` processes that know of each other, as a launcher starts them."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, *command], env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        printed = [one.communicate(timeout=120) for one in running]
    finally:
        for one in running:
            one.kill()
    return [
        subprocess.CompletedProcess(command, one.returncode, *texts)
        for one, texts in zip(running, printed, strict=True)
    ]


def same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, Mapping):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, Tensor):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6), where
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6), where
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{where}/{number}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("processes")
    ran = together([str(ROOT / "tests" / "shared_work.py"), str(folder)])
    assert [one.returncode for one in ran] == [0, 0], ran[0].stderr + ran[1].stderr
    with pytest.MonkeyPatch.context() as patched:
        for module in (shared_work.loop, shared_work.forcing):
            patched.setattr(module, "_BATCH_TOKENS", dict(module._BATCH_TOKENS))
        patched.setattr(shared_work.corpus, "_TEXTS_AT_ONCE", shared_work.corpus._TEXTS_AT_ONCE)
        patched.setattr(shared_work.loop, "_read_batch", shared_work.loop._read_batch)
        alone = shared_work.everything(folder / "alone")
    return {"alone": alone, "folder": folder} | {
        rank: torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_two_processes_come_to_what_one_does(found: dict[Any, Any], verb: str) -> None:
    same(found[0][verb], found["alone"][verb])
    same(found[1][verb], found["alone"][verb])


@pytest.mark.slow
def test_the_strongest_texts_are_found_in_all_processes(found: dict[Any, Any]) -> None:
    values, texts = found["alone"]["features"]["strongest"], found["alone"]["strongest texts"]
    alike = (values[:, 1:] - values[:, :-1]).abs().amin(
        1
    ) < 1e-5  # which of two that fire as strongly comes first is open
    assert alike.sum() < len(values) / 2
    for rank in (0, 1):
        assert torch.equal(found[rank]["strongest texts"][~alike, :2], texts[~alike, :2])


@pytest.mark.slow
def test_each_process_reads_its_share_and_no_text_twice(found: dict[Any, Any]) -> None:
    whole, shares = found["alone"], (found[0], found[1])
    assert sorted(shares[0]["texts read"] + shares[1]["texts read"]) == whole["texts read"]
    for share in shares:
        assert 0.4 * whole["batches"] < share["batches"] < 0.6 * whole["batches"]


@pytest.mark.slow
def test_the_first_process_keeps_the_texts_of_all(found: dict[Any, Any]) -> None:
    kept = [
        sorted(path.name for path in (found["folder"] / who / "texts").rglob("*.json")) for who in ("shared", "alone")
    ]
    assert kept[0] == kept[1] and len(kept[0]) > 2


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_all(found: dict[Any, Any]) -> None:
    for rank in (0, 1):
        assert found[rank]["refusals"][0] == "UsageError: not here"
        assert found[rank]["refusals"][1].startswith("RuntimeError: ValueError: ")


@pytest.mark.slow
def test_processes_with_other_free_memory_read_the_same_batches(found: dict[Any, Any]) -> None:
    """What fits at once depends on what is free; the first says it for all."""
    for rank in (0, 1):
        same(found[rank]["little memory"], found["alone"]["little memory"])


@pytest.mark.slow
def test_there_may_be_more_processes_than_things_to_do(tmp_path: Path) -> None:
    ran = together([str(ROOT / "tests" / "shared_work.py"), str(tmp_path), "few"], count=3)
    assert [one.returncode for one in ran] == [0, 0, 0], "".join(one.stderr for one in ran)
    few = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(3)]
    same(few[1], few[0])
    same(few[2], few[0])
    same(few[0], shared_work.few())


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_is_told_by_it_and_by_those_who_lose_it(tmp_path: Path) -> None:
    here = tmp_path / "here.csv"
    here.write_text("text,label\n" + "".join(f"a {n},positive\nb {n},negative\n" for n in range(4)))
    command = ["-c", f"""
import os, sys
sys.argv = ['neurosteer', 'build', {str(here)!r} if os.environ['RANK'] == '0' else 'elsewhere.csv', '--layers', '1']
sys.argv += ['--model', {str(tmp_path / 'model')!r}, '--no-calibrate', '--out', {str(tmp_path / 'out')!r}]
from neurosteer.cli import main
main()
"""]  # fmt: skip
    this = tinies.tiny("llama").lm
    this.model.save_pretrained(tmp_path / "model")
    this.tokenizer.save_pretrained(tmp_path / "model")
    first, second = together(command)
    assert second.returncode == 2 and "neurosteer (process 1): " in second.stderr and "elsewhere.csv" in second.stderr
    assert first.returncode != 0 and "Process 1 ended: " in first.stderr and "elsewhere.csv" in first.stderr


@pytest.mark.slow
def test_the_command_line_is_shared_by_a_launcher(tmp_path: Path) -> None:
    this = tinies.tiny("llama").lm
    this.model.save_pretrained(tmp_path / "model")
    this.tokenizer.save_pretrained(tmp_path / "model")
    asked = ["-m", "neurosteer", "build", "formality", "--model", str(tmp_path / "model"), "--layers", "0-2"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", *plain]
    for command, out in (([], "one"), (launcher, "two")):
        ran = subprocess.run(
            [sys.executable, *command, *asked, "--out", str(tmp_path / out)], capture_output=True, text=True, cwd=ROOT,
            timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("Built formality-caa") == 1  # one speaks for all
    one, two = (load(tmp_path / name) for name in ("one", "two"))
    same(shared_work.numbers(one), shared_work.numbers(two))
    assert one.provenance.examples_sha256 == two.provenance.examples_sha256


@pytest.mark.slow
def test_what_cannot_be_shared_is_done_once_and_a_mistake_is_told_once(tmp_path: Path) -> None:
    first, second = together(["-m", "neurosteer", "models", "--json"])
    assert (first.returncode, second.returncode) == (0, 0) and "SmolLM2" in first.stdout and not second.stdout
    first, second = together(["-m", "neurosteer", "build", str(tmp_path / "nothing.csv")])
    assert (first.returncode, second.returncode) == (2, 2)
    assert "nothing.csv" in first.stderr and not second.stderr
    first, second = together(["-m", "neurosteer", "sae", "list"])
    assert (first.returncode, second.returncode) == (0, 0) and first.stdout and not second.stdout


def test_one_process_is_alone_whatever_runs_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some containers have it
    assert not processes.are_several() and processes.join_processes() == 0
    assert (processes.rank(), processes.count()) == (0, 1)
    assert processes.own([1, 2, 3]) == [1, 2, 3] and processes.gathered("a") == ["a"]
    assert processes.agreed(lambda: 5) == 5
    assert processes.shared_out([1, 2], lambda some: [one + 1 for one in some]) == [2, 3]
    tensor = torch.ones(2)
    assert processes.summed(tensor) is tensor


def test_processes_that_cannot_be_reached_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.UsageError, match="99999"):
        processes.join_processes()
