"""The check for GPUs, tried at tiny size on a CPU; and that it notices what is wrong."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from benchmarks import gpu_check
from benchmarks.gpu_check import Scale, Subject, Table, Wrong, examples, out_of_memory, read_right, steered

from neurosteer.reading.tally import Tally

SCALE = Scale(True, torch.device("cpu"))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(lambda: SCALE.llama(torch.float32), SCALE)


@pytest.mark.slow
def test_at_tiny_size_every_check_is_right() -> None:
    command = [sys.executable, gpu_check.__file__, "--tiny", "--device", "cpu"]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=540, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("| ")][1:]
    assert ran.returncode == 0, [line for line in lines if "| right |" not in line] or ran.stderr[-2000:]
    assert len(lines) > 30 and all("| right |" in line for line in lines)
    for name in ("Llama, float16", "Gemma, bfloat16", "10 tokens", "calibration", "32 streamed rows", "relp",
                 "out of memory", "loading", "offloaded", "two processes"):  # fmt: skip
        assert any(name in line for line in lines), name


def test_steering_that_is_not_what_it_should_be_is_wrong(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "s.d." in steered(subject.lm, subject.vector, SCALE)
    real = gpu_check.naive_writes
    monkeypatch.setattr(gpu_check, "naive_writes", lambda lm, artifact, strength: real(lm, artifact, 0.7 * strength))
    with pytest.raises(Wrong, match="below the naive best"):
        steered(subject.lm, subject.vector, SCALE)


def test_a_reading_that_is_off_is_wrong(subject: Subject) -> None:
    assert "within" in read_right(subject.lm, subject.vector, subject.sets)
    with pytest.raises(Wrong, match="class differences are off"):
        read_right(subject.lm, subject.vector, examples(8, 6, seed=3))


def test_a_batch_that_is_counted_twice_is_wrong(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "halved, told once" in out_of_memory(subject.lm, examples(12, 6))
    real = Tally.begin

    def begin(self: Tally, *arguments: Any, **named: Any) -> None:
        before = self.batch.sums if self.batch is not None else []
        real(self, *arguments, **named)
        assert self.batch is not None
        self.batch.sums += before  # what a batch that failed had added

    monkeypatch.setattr(Tally, "begin", begin)
    with pytest.raises(Wrong, match="in parts is off"):
        out_of_memory(subject.lm, examples(12, 6))


def test_what_fails_is_a_line_of_the_table_and_what_comes_too_late_is_left_out() -> None:
    table = Table(time.monotonic() + 60)

    def fails() -> str:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words.")

    table.check("one", lambda: "fine")
    table.check("two", fails)
    table.until = 0.0
    table.check("three", lambda: "fine")
    assert table.wrong == 1
    assert table.lines == [
        "| one | right | fine | 0 |",
        "| two | **wrong** | OutOfMemoryError: CUDA out of memory. | 0 |",
        "| three | left out | no time was left | 0 |",
    ]


def test_a_wrong_result_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--device", "cpu"])
    monkeypatch.setattr(gpu_check, "check_all", lambda table, scale: table.check("all", lambda: "fine"))
    assert gpu_check.main() == 0
    monkeypatch.setattr(gpu_check, "check_all", lambda table, scale: table.check("all", lambda: str(1 / 0)))
    assert gpu_check.main() == 1
    assert "| all | **wrong** | ZeroDivisionError: division by zero | 0 |" in capsys.readouterr().out
