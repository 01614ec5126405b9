"""Training sparse autoencoders: cut and taken up again, measured against loops of our own, read back by sae-lens."""

import csv
import dataclasses
import hashlib
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import Run, refused
from safetensors.torch import load_file
from tiny import (
    D_MODEL,
    N_LAYERS,
    Tiny,
    byte_tokenizer,
    first,
    hook_count,
    make_tiny,
    naive_states,
    own_hooks,
    positions_read,
    texts,
    tiny,
)
from tiny_saes import random_sae
from torch import Tensor

from neurosteer.errors import Cancelled, UsageError
from neurosteer.models.language_model import FramedText, LanguageModel
from neurosteer.saes import corpus as sae_corpus
from neurosteer.saes import measuring as sae_measuring
from neurosteer.saes import training as sae_training
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.saes.corpus import Corpus, TrainingOptions, TrainingText, read_training_texts
from neurosteer.saes.loading import load_sae
from neurosteer.saes.measuring import SaeMeasures, measure_saes
from neurosteer.saes.training import measures_of, train_saes

TEXTS = [TrainingText(text) for text in texts(300, seed=41)]
OPTIONS = TrainingOptions(
    features=40, active=4, tokens=1500, batch_tokens=64, chunk_tokens=400, held_out_tokens=300, max_tokens=32
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few texts make a chunk."""
    monkeypatch.setattr(sae_corpus, "_TEXTS_AT_ONCE", 10)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "cfg.json").read_text(encoding="utf-8"))


def same_saes(one: dict[int, Path], other: dict[int, Path]) -> bool:
    return list(one) == list(other) and all(
        config(one[layer]) == config(other[layer])
        and weights(one[layer]).keys() == weights(other[layer]).keys()
        and all(torch.equal(weights(one[layer])[name], value) for name, value in weights(other[layer]).items())
        for layer in one
    )


# --- cut and taken up again ------------------------------------------------------------------------------------------


class CutAt:
    """Cancels training at the `count`-th message that begins with `words`."""

    def __init__(self, words: str, count: int) -> None:
        self.words, self.left, self.cancel = words, count, threading.Event()

    def __call__(self, message: str, fraction: float | None = None) -> None:
        self.left -= message.startswith(self.words)
        if self.left == 0:
            self.cancel.set()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_corpus, "_TEXTS_AT_ONCE", 10)
        return train_saes(tiny("llama").lm, TEXTS, [1, 2], tmp_path_factory.mktemp("saes") / "whole", OPTIONS)


@pytest.mark.parametrize(
    ("words", "count"),
    [("Reading activations", 1), ("Reading activations", 3), ("Training", 1), ("Training", 2), ("Measuring", 1)],
)
def test_training_that_was_cut_ends_in_the_same_weights_bit_for_bit(
    llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path], words: str, count: int
) -> None:
    cut = CutAt(words, count)
    with pytest.raises(Cancelled):
        train_saes(llama.lm, TEXTS, [1, 2], tmp_path / "saes", OPTIONS, progress=cut, cancel=cut.cancel)
    assert hook_count(llama.model) == 0
    messages: list[str] = []
    found = train_saes(
        llama.lm,
        TEXTS,
        [2, 1],
        tmp_path / "saes",
        OPTIONS,
        progress=lambda message, fraction=None: messages.append(message),
    )
    assert same_saes(found, uninterrupted)
    read = sum(message.startswith("Reading activations") for message in messages)
    done = {"Reading activations": count - 1, "Training": count, "Measuring": 4}[words]
    assert read == 4 - done
    assert sorted(path.name for path in (tmp_path / "saes").iterdir()) == ["layer_1", "layer_2"]


def test_training_that_is_cut_at_every_chunk_ends_in_the_same_weights(
    llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path]
) -> None:
    for _ in range(4):
        cut = CutAt("Training", 1)
        with pytest.raises(Cancelled):
            train_saes(llama.lm, TEXTS, [1, 2], tmp_path, OPTIONS, progress=cut, cancel=cut.cancel)
    assert same_saes(train_saes(llama.lm, TEXTS, [1, 2], tmp_path, OPTIONS), uninterrupted)


def test_a_crash_loses_what_came_after_the_last_state(
    llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one in the middle of writing the state. With a state after every chunk that is one chunk at most."""
    monkeypatch.setattr(sae_training, "_SAVE_SECONDS", -1.0)  # after every chunk
    saved, real = [0], Path.rename

    def fail(path: Path, target: Path) -> Path:
        saved[0] += 1
        if saved[0] == 3:
            raise OSError("no space left")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="no space left"):
            train_saes(llama.lm, TEXTS, [1, 2], tmp_path, OPTIONS)
    assert same_saes(train_saes(llama.lm, TEXTS, [1, 2], tmp_path, OPTIONS), uninterrupted)


def test_the_state_is_written_by_the_clock_and_at_the_end(
    llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four chunks."""
    renamed: list[Path] = []
    real = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: renamed.append(path) or real(path, target))
    for seconds, times in ((1e6, 1), (-1.0, 4)):
        renamed.clear()
        monkeypatch.setattr(sae_training, "_SAVE_SECONDS", seconds)
        found = train_saes(llama.lm, TEXTS, [1, 2], tmp_path / str(seconds), OPTIONS)
        assert len(renamed) == times and same_saes(found, uninterrupted)


def test_each_depth_trains_as_if_alone(llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    for layer in (1, 2):
        alone = train_saes(llama.lm, TEXTS, [layer], tmp_path / str(layer), OPTIONS)
        assert same_saes(alone, {layer: uninterrupted[layer]})


def test_another_seed_gives_other_weights(llama: Tiny, tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    other = train_saes(llama.lm, TEXTS, [1], tmp_path, dataclasses.replace(OPTIONS, seed=1))
    assert not torch.equal(weights(other[1])["W_dec"], weights(uninterrupted[1])["W_dec"])


def test_training_leaves_the_global_random_numbers_alone(llama: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(123)
    wanted = torch.rand(3)
    torch.manual_seed(123)
    train_saes(llama.lm, TEXTS, [0], tmp_path, dataclasses.replace(OPTIONS, tokens=64))
    assert torch.equal(torch.rand(3), wanted)


def changed_texts(kind: str) -> list[TrainingText]:
    if kind == "fewer texts":
        return TEXTS[:-1]
    if kind == "another text":
        return [*TEXTS[:-1], TrainingText("something else")]
    if kind == "another prompt":
        return [dataclasses.replace(TEXTS[0], prompt="Why?"), *TEXTS[1:]]
    return TEXTS


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        ("fewer texts", {}, "texts"),
        ("another text", {}, "texts"),
        ("another prompt", {}, "texts"),
        ("features", {"options": dataclasses.replace(OPTIONS, features=41)}, "options"),
        ("tokens", {"options": dataclasses.replace(OPTIONS, tokens=1501)}, "options"),
        ("seed", {"options": dataclasses.replace(OPTIONS, seed=1)}, "options"),
        ("framings", {"options": dataclasses.replace(OPTIONS, framings=("raw", "answer"))}, "options"),
        ("layers", {"layers": [1, 2]}, "layers"),
        ("model", {"lm": "another"}, "model"),
    ],
)
def test_another_trainings_folder_is_refused_in_one_line(
    llama: Tiny, tmp_path: Path, kind: str, changes: dict[str, Any], word: str
) -> None:
    cut = CutAt("Training", 1)
    with pytest.raises(Cancelled):
        train_saes(llama.lm, TEXTS, [1], tmp_path, OPTIONS, progress=cut, cancel=cut.cancel)
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    lm = make_tiny("llama", seed=1).lm if "lm" in changes else llama.lm
    layers, options = changes.get("layers", [1]), changes.get("options", OPTIONS)
    refused(
        lambda: train_saes(lm, changed_texts(kind), layers, tmp_path, options),
        UsageError,
        str(tmp_path),
        word,
        "another folder",
    )
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_trained_sae_is_read_alike_by_sae_lens_and_by_us(llama: Tiny, uninterrupted: dict[int, Path]) -> None:
    from sae_lens import SAE

    rows = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0)) * 10
    for layer, folder in uninterrupted.items():
        ours, theirs = load_sae(llama.lm, folder), SAE.load_from_disk(folder, device="cpu", dtype="float32")
        assert (ours.layer, ours.kind, ours.n_features, ours.model_name) == (layer, "jumprelu", 40, "tiny/llama")
        assert theirs.cfg.architecture() == "jumprelu"
        assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        with torch.no_grad():
            features = theirs.encode(rows)
            assert torch.allclose(ours.encode(rows), features, atol=1e-4) and bool((features > 0).any())
            assert torch.allclose(ours.decode(features), theirs.decode(features), atol=1e-4)
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float16}
        assert set(weights(folder)) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}


def test_the_card_and_the_config_say_what_was_trained_and_measured(llama: Tiny, uninterrupted: dict[int, Path]) -> None:
    for layer, folder in uninterrupted.items():
        about, card = config(folder)["metadata"], (folder / "README.md").read_text(encoding="utf-8")
        assert (about["model_name"], about["model_fingerprint"]) == ("tiny/llama", llama.lm.fingerprint)
        assert about["training"] == {**dataclasses.asdict(OPTIONS), "framings": ["raw"]}
        assert 1500 <= about["training_tokens"] < 1500 + 400
        assert config(folder)["device"] == "cpu" and config(folder)["normalize_activations"] == "none"
        measured = measures_of(folder)
        assert set(measured) == {field.name for field in dataclasses.fields(SaeMeasures)}
        assert f"blocks.{layer}.hook_resid_post" in card and "40 features" in card and "tiny/llama" in card
        for figure in (f"{measured['explained_variance']:.3f}", f"{measured['l0']:.1f}", f"{measured['dead']:.1%}"):
            assert figure in card
        assert str(folder.parent) not in card + json.dumps(config(folder))


# --- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_measures(this: Tiny, sae: Any, layer: int, framed: Sequence[FramedText], at_most: int, centred: bool) -> Any:
    """One text at a time through sae-lens's encoding; centring and every sum are spelled out."""

    def rebuilt(vector: Tensor) -> Tensor:
        mean = vector.mean() if centred else torch.zeros(())
        return sae.decode(sae.encode((vector - mean)[None]))[0] + mean

    vectors = [
        vector
        for item in framed
        for vector in naive_states(this, item.ids)[0][layer, positions_read(len(item.ids), item.start)]
    ]
    mean = torch.stack(vectors).double().mean(0)
    lost = sum(float((vector - rebuilt(vector)).double().square().sum()) for vector in vectors)
    total = 0.0
    for vector in vectors:
        away = vector.double() - mean
        total += float(((away - away.mean()) if centred else away).square().sum())
    encoded = [sae.encode((vector - vector.mean() if centred else vector)[None])[0] for vector in vectors]
    active = [int((features > 0).sum()) for features in encoded]
    dead = 1 - float(torch.stack([features > 0 for features in encoded]).any(0).float().mean())

    def loss(item: FramedText, change: Callable[[Tensor], Tensor] | None) -> float:
        places = [place for place in range(item.start, len(item.ids)) if place > 0]

        def replace(_module: Any, _inputs: Any, output: Any) -> Any:
            if change is None:
                return None
            hidden = first(output).clone()
            for place in places:
                hidden[0, place] = change(hidden[0, place])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with own_hooks([(this.blocks[layer], replace)]):
            logits = this.model(torch.tensor([item.ids]), use_cache=False).logits[0]
        logs = torch.log_softmax(logits.double(), -1)
        return -sum(float(logs[place, item.ids[place + 1]]) for place in places[:-1])

    plain = reconstructed = ablated = counted = 0.0
    for item in framed:
        if counted >= at_most:
            break
        plain += loss(item, None)
        reconstructed += loss(item, rebuilt)
        ablated += loss(item, lambda _: mean.float())
        counted += len([place for place in range(item.start, len(item.ids)) if place > 0]) - 1
    recovered = (ablated - reconstructed) / (ablated - plain)
    return 1 - lost / total, sum(active) / len(active), dead, recovered, len(vectors), int(counted)


@pytest.mark.parametrize("at_most", [60, 10_000])
@pytest.mark.parametrize(("architecture", "layer"), [("llama", 1), ("gemma2", 2), ("gpt2", 2), ("gpt2", 3)])
def test_the_figures_are_those_of_a_loop(tmp_path: Path, architecture: str, layer: int, at_most: int) -> None:
    from sae_lens import SAE

    this, centred = tiny(architecture), architecture == "gpt2" and layer == 2
    about = {"model_from_pretrained_kwargs": {"center_writing_weights": True}} if centred else {}
    plain = random_sae(layer, scale=25.0, jumps=True)
    plain = dataclasses.replace(plain, w_dec=plain.w_enc.T.contiguous())  # which explains something
    folder = plain.write(tmp_path / "sae", f"blocks.{layer}.hook_resid_post", metadata=about)
    sae = load_sae(this.lm, folder)
    assert sae.centred is centred
    some = texts(12, seed=43)
    framed = [
        *this.lm.frame(some[:6], "raw", max_tokens=30),
        *this.lm.frame(some[6:], "answer", max_tokens=30),
    ]
    framed = [item for item in framed if len(item.ids) > item.start + 1]
    found = measure_saes(this.lm, [sae], framed, cross_entropy_tokens=at_most)[0]
    wanted = naive_measures(this, SAE.load_from_disk(folder, device="cpu"), layer, framed, at_most, centred)
    assert dataclasses.astuple(found) == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    assert (found.n_tokens, found.n_tokens_cross_entropy) == wanted[4:]
    assert hook_count(this.model) == 0


def test_an_sae_that_rebuilds_the_stream_exactly_recovers_everything(llama: Tiny) -> None:
    """Features of both signs of every dimension."""
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae = SparseAutoencoder(
        name="exact",
        layer=1,
        model_name="",
        decoder=both,
        encode_rows=lambda rows: (rows @ both.T).clamp(min=0),
        decode_rows=lambda features: features @ both,
    )
    found = measure_saes(llama.lm, [sae], llama.lm.frame(texts(10, seed=44), "raw", max_tokens=30))[0]
    assert found.explained_variance == pytest.approx(1.0) and found.cross_entropy_recovered == pytest.approx(1.0)
    assert found.l0 == pytest.approx(D_MODEL, abs=0.1)


def test_an_sae_that_gives_the_mean_explains_and_recovers_nothing(llama: Tiny) -> None:
    framed = llama.lm.frame(texts(10, seed=44), "raw", max_tokens=30)
    rows = torch.cat([naive_states(llama, item.ids)[0][1, positions_read(len(item.ids))] for item in framed])
    mean = rows.mean(0)
    sae = SparseAutoencoder(
        name="mean",
        layer=1,
        model_name="",
        decoder=torch.zeros(5, D_MODEL),
        encode_rows=lambda rows: torch.zeros(len(rows), 5),
        decode_rows=lambda features: mean.expand(len(features), -1),
    )
    found = measure_saes(llama.lm, [sae], framed)[0]
    assert found.explained_variance == pytest.approx(0.0, abs=1e-5)
    assert found.cross_entropy_recovered == pytest.approx(0.0, abs=1e-4)
    assert (found.l0, found.dead) == (0.0, 1.0)


def test_texts_too_short_to_predict_anything_still_measure(llama: Tiny, tmp_path: Path) -> None:
    """Two tokens of which the first is never read: nothing follows the one that is."""
    sae = load_sae(llama.lm, random_sae(1, scale=25.0).write(tmp_path / "sae"))
    framed = [FramedText([5, 6], 0, False), FramedText([7, 8], 0, False)]
    found = measure_saes(llama.lm, [sae], framed)[0]
    assert (found.n_tokens, found.n_tokens_cross_entropy, found.cross_entropy_recovered) == (2, 0, 0.0)


# --- learning --------------------------------------------------------------------------------------------------------


def planted_model() -> tuple[Tiny, Tensor]:
    """A llama whose stream is the token's embedding: two of 16 known directions, at random heights."""
    this = make_tiny("llama", chat=False)
    generator = torch.Generator().manual_seed(7)
    planted = torch.nn.functional.normalize(torch.randn(16, D_MODEL, generator=generator), dim=1)
    with torch.no_grad():
        for block in this.model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embeddings = this.model.model.embed_tokens.weight
        for token in range(len(embeddings)):
            one, other = torch.randperm(16, generator=generator)[:2].tolist()
            heights = 1 + torch.rand(2, generator=generator)
            embeddings[token] = heights[0] * planted[one] + heights[1] * planted[other]
    return this, planted


def test_training_finds_a_planted_dictionary(tmp_path: Path) -> None:
    this, planted = planted_model()
    tokenizer = byte_tokenizer(chat=False)
    rng = np.random.default_rng(0)
    many = [TrainingText(str(tokenizer.decode(rng.integers(4, 300, 40).tolist()))) for _ in range(600)]
    options = TrainingOptions(
        features=32, active=2, tokens=45_000, batch_tokens=64, chunk_tokens=8000, held_out_tokens=1000,
        learning_rate=1e-2, max_tokens=64,
    )  # fmt: skip
    untrained = train_saes(this.lm, many, [1], tmp_path / "none", dataclasses.replace(options, tokens=1))
    trained = train_saes(this.lm, many, [1], tmp_path / "some", options)
    before, after = (measures_of(found[1]) for found in (untrained, trained))
    assert after["explained_variance"] > 0.9 > 0.5 > before["explained_variance"]
    assert after["cross_entropy_recovered"] > 0.9
    assert 1.0 < after["l0"] < 4.0

    def closest(folder: Path) -> Tensor:
        return (planted @ torch.nn.functional.normalize(weights(folder)["W_dec"].float(), dim=1).T).max(1).values

    assert float(closest(trained[1]).min()) > 0.7 and float(closest(trained[1]).median()) > 0.82
    assert float(closest(untrained[1]).median()) < 0.65  # of some 30 random directions the closest to one


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[int], int]]]:
    """The token ids of every text that is read, and where the text begins in them."""
    seen: list[tuple[list[int], int]] = []
    real = sae_measuring.read_tokens

    def read(lm: LanguageModel, framed: Sequence[FramedText], *arguments: Any, **named: Any) -> dict[int, Tensor]:
        seen.extend((item.ids, item.start) for item in framed)
        return real(lm, framed, *arguments, **named)

    monkeypatch.setattr(sae_measuring, "read_tokens", read)
    yield seen


@pytest.mark.parametrize("tokens", [1500, 9000])
def test_held_out_texts_are_never_trained_on(
    llama: Tiny, tmp_path: Path, read_ids: list[tuple[list[int], int]], tokens: int
) -> None:
    """Also where the texts are too few, and are taken again."""
    measured_from: list[int] = []

    def progress(message: str, fraction: float | None = None) -> None:
        if message.startswith("Measuring"):
            measured_from.append(len(read_ids))

    some = TEXTS[:120]
    options = dataclasses.replace(OPTIONS, tokens=tokens, held_out_tokens=200)
    train_saes(llama.lm, some, [1], tmp_path, options, progress=progress)
    ids_of = {tuple(llama.lm.tokenizer(item.text)["input_ids"][:32]): item.text for item in some}
    trained, held = read_ids[: measured_from[0]], read_ids[measured_from[0] :]
    assert all(start == 0 for _, start in read_ids)
    trained_texts, held_texts = ({ids_of[tuple(ids)] for ids, _ in part} for part in (trained, held))
    assert not trained_texts & held_texts
    assert sum(len(ids) for ids, _ in held) >= 200
    assert len(held_texts) == len(held) < 60
    again = len(trained) - len(trained_texts)
    assert (again == 0) is (tokens == 1500)
    if again:
        readable = {text for ids, text in ids_of.items() if len(ids) > 1}
        assert trained_texts | held_texts == readable


def test_answers_come_after_their_prompts_and_texts_take_turns_under_the_framings(
    llama: Tiny, tmp_path: Path, read_ids: list[tuple[list[int], int]]
) -> None:
    tokenizer = llama.lm.tokenizer
    mixed = [TrainingText(f"{item.text} yes", f"Why {place}?") for place, item in enumerate(TEXTS[:60])] + TEXTS[60:200]
    options = dataclasses.replace(OPTIONS, framings=("raw", "answer", "prompt"), max_tokens=200)
    train_saes(llama.lm, mixed, [1], tmp_path, options)
    kinds = {"raw": 0, "answer": 0, "prompt": 0, "prompted": 0}
    prompts = {item.text: item.prompt for item in mixed}
    for ids, start in read_ids:
        whole, own = tokenizer.decode(ids), tokenizer.decode(ids[start:])
        if own in prompts and prompts[own] is not None:
            kinds["prompted"] += 1
            user = f"<|im_start|>user\n{prompts[own]}<|im_end|>\n<|im_start|>assistant\n"
            assert whole == user + own
        elif own in prompts:
            kinds["answer" if start else "raw"] += 1
            assert whole in (own, f"<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n{own}")
        else:
            kinds["prompt"] += 1
            text = own.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
            assert text in prompts and whole == f"<|im_start|>user\n{own}"
    assert all(count > 5 for count in kinds.values()), kinds


def test_no_token_of_a_template_and_no_first_token_is_trained_on(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.training.sae_trainer import SAETrainer

    rows: list[Tensor] = []
    real = SAETrainer.step
    monkeypatch.setattr(SAETrainer, "step", lambda trainer, batch: rows.append(batch) or real(trainer, batch))
    some, turn = TEXTS[:40], "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    options = dataclasses.replace(OPTIONS, tokens=200, framings=("raw", "answer"), held_out_tokens=50)
    train_saes(llama.lm, some, [1], tmp_path, options)
    trained = torch.cat(rows)
    tokenizer, allowed, other = llama.lm.tokenizer, [], []
    for item in some:
        plain = tokenizer(item.text)["input_ids"]
        start = tokenizer(turn, add_special_tokens=False)["input_ids"]
        raw, answer = naive_states(llama, plain)[0][1], naive_states(llama, start + plain)[0][1]
        allowed += [raw[1:], answer[len(start) :]]
        other += [raw[:1], answer[: len(start)]]

    def nearest(among: list[Tensor]) -> Tensor:
        exact: Any = "donot_use_mm_for_euclid_dist"
        return torch.cdist(trained, torch.cat(among), compute_mode=exact).min(1).values

    assert float(nearest(allowed).max()) < 1e-3 < float(nearest(other).min())


@pytest.mark.parametrize("name", ["some.jsonl", "some.csv", "some.txt", "some"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_are_read_from_json_lines_tables_and_plain_files(tmp_path: Path, name: str, mark: str) -> None:
    path = tmp_path / name
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        if name == "some.jsonl":
            file.write(
                '{"text": "ein Löwe", "prompt": "Was?"}\n\n{"text": "two\\nlines"}\n{"text": "3", "prompt": null}\n'
            )
        elif name == "some.csv":
            csv.writer(file).writerows(
                [["id", "prompt", "text"], [1, "Was?", "ein Löwe"], [2, "", "two\nlines"], [3, "", "3"], [4, "x", " "]]
            )
        else:
            file.write("ein Löwe\r\n\n  \ntwo lines\n3")
    found = list(read_training_texts([path]))
    if name in ("some.jsonl", "some.csv"):
        assert found == [TrainingText("ein Löwe", "Was?"), TrainingText("two\nlines"), TrainingText("3")]
    else:
        assert found == [TrainingText("ein Löwe"), TrainingText("two lines"), TrainingText("3")]
    assert list(read_training_texts([path, str(path)])) == found * 2


def test_a_table_with_a_very_long_text_is_read(tmp_path: Path) -> None:
    long = "word " * 40_000
    with (tmp_path / "long.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text"], [long]])
    assert list(read_training_texts([tmp_path / "long.csv"])) == [TrainingText(long)]


def test_texts_larger_than_memory_are_read_one_at_a_time(llama: Tiny, tmp_path: Path) -> None:
    line = "the cat runs " * 60
    with (tmp_path / "many.txt").open("w") as file:
        file.writelines(f"{number} {line}\n" for number in range(40_000))
    size = (tmp_path / "many.txt").stat().st_size
    tracemalloc.start()
    try:
        found = read_training_texts([tmp_path / "many.txt"])
        corpus = Corpus(llama.lm, found, OPTIONS)
        corpus.take(0, 400)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 30e6 and peak < size / 5
    assert len(found) == 40_000 and found[-1].text.startswith("39999 the") and found[3:5] == [found[3], found[4]]
    whole = Corpus(llama.lm, list(found), OPTIONS)  # the same order and hash as from memory
    assert (
        whole.sha256
        == corpus.sha256
        == hashlib.sha256(json.dumps([(one.text, None) for one in found]).encode()).hexdigest()
    )
    assert [one.ids for one in whole.take(0, 400)[0]] == [one.ids for one in corpus.take(0, 400)[0]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"words": "no"}\n', ["a.jsonl", "line 2", "text"]),
        ("a.jsonl", b'{"text": "fine"}\nnot json\n', ["line 2"]),
        ("a.jsonl", b'["text"]\n', ["line 1"]),
        ("a.jsonl", b'{"text": 5}\n', ["line 1", "must be texts"]),
        ("a.jsonl", b'{"text": "fine", "prompt": 5}\n', ["line 1", "must be texts"]),
        ("a.jsonl", b'{"text": null}\n', ["line 1"]),
        ("a.csv", b"prompt,words\na,b\n", ["a.csv", "column 'text'"]),
        ("a.csv", b"prompt,text\nonly a prompt\n", ["a.csv", "line 2"]),
        ("a.csv", b"", ["a.csv"]),
        ("a.txt", b"", ["a.txt", "no text"]),
        ("a.txt", b"\n  \n", ["a.txt", "no text"]),
        ("a.txt", b"\xff\xfe\x00", ["a.txt", "UTF-8"]),
        ("a.csv", b"text\n\xff\n", ["a.csv", "UTF-8"]),
    ],
)
def test_a_file_that_cannot_be_read_is_a_clear_error(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_training_texts([tmp_path / name]), UsageError, *words)


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    refused(lambda: read_training_texts([tmp_path / "missing.txt"]), UsageError, "missing.txt")
    refused(lambda: read_training_texts([tmp_path]), UsageError, tmp_path.name)
    refused(lambda: read_training_texts([]), UsageError, "no file")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"features": 0}, ["features", "0"]),
        ({"features": 2.5}, ["features", "2.5"]),
        ({"tokens": -1}, ["tokens", "-1"]),
        ({"batch_tokens": 0}, ["batch_tokens"]),
        ({"chunk_tokens": 0}, ["chunk_tokens"]),
        ({"max_tokens": 0}, ["max_tokens"]),
        ({"held_out_tokens": 0}, ["held_out_tokens"]),
        ({"active": 0}, ["active", "0"]),
        ({"active": 41, "features": 40}, ["active", "41", "40"]),
        ({"active": float("nan")}, ["active", "nan"]),
        ({"learning_rate": 0}, ["learning_rate"]),
        ({"learning_rate": 1.0}, ["learning_rate", "1.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"framings": ()}, ["framings", "raw, prompt, answer"]),
        ({"framings": ("chat",)}, ["framings", "chat", "raw, prompt, answer"]),
    ],
)
def test_a_wrong_option_is_refused_naming_it(given: dict[str, Any], words: list[str]) -> None:
    refused(lambda: TrainingOptions(**given), UsageError, *words)


@pytest.mark.parametrize("layers", [[], [N_LAYERS], [-1], [0, 99]])
def test_layers_that_the_model_does_not_have_are_refused(llama: Tiny, tmp_path: Path, layers: list[int]) -> None:
    refused(lambda: train_saes(llama.lm, TEXTS, layers, tmp_path, OPTIONS), UsageError, "layers", "0 to 3")


def test_too_few_texts_are_refused(llama: Tiny, tmp_path: Path) -> None:
    refused(
        lambda: train_saes(llama.lm, TEXTS[:3], [1], tmp_path, OPTIONS), UsageError, "3 texts", "held out", "more texts"
    )
    single = [TrainingText(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    refused(lambda: train_saes(llama.lm, single, [1], tmp_path, OPTIONS), UsageError, "26 texts", "more texts")
    refused(lambda: train_saes(llama.lm, [], [1], tmp_path, OPTIONS), UsageError, "0 texts", "more texts")


def test_texts_of_one_token_beyond_the_held_out_ones_are_refused_rather_than_sought_for_ever(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_corpus.random.Random, "shuffle", lambda *_: None)
    some = [*TEXTS[:10], *(TrainingText(letter) for letter in "abcdefghijklmnopqrstuvwxyz")]
    options = dataclasses.replace(OPTIONS, held_out_tokens=20)
    refused(lambda: train_saes(llama.lm, some, [1], tmp_path, options), UsageError, "texts", "more texts")


def test_a_base_model_refuses_framings_of_chat_models(tmp_path: Path) -> None:
    base = make_tiny("llama", chat=False).lm
    options = dataclasses.replace(OPTIONS, framings=("answer",))
    refused(lambda: train_saes(base, TEXTS, [1], tmp_path, options), UsageError, "base model", "raw")


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(item.text for item in TEXTS), encoding="utf-8")
    return path


SMALL = ("--features", 40, "--active", 4, "--tokens", 300, "--batch-tokens", 64, "--held-out", 200, "--max-tokens", 32)


def test_the_command_line_trains_and_prints_one_json_object(
    run: Run, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    from neurosteer.models.loading import load_model

    options = ("--model", model_folder, "--dtype", "float32", "--layers", "1,3", *SMALL, "--json")
    ran = run("sae", "train", texts_file, *options, "--out", tmp_path / "saes")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["saes"]
    assert set(found) == {"1", "3"}
    lm = load_model(model_folder, dtype="float32")
    for layer, about in found.items():
        folder = tmp_path / "saes" / f"layer_{layer}"
        assert about["folder"] == str(folder)
        assert {key: value for key, value in about.items() if key != "folder"} == measures_of(folder)
        sae = load_sae(lm, folder)
        assert (sae.layer, sae.n_features, sae.model_name) == (int(layer), 40, "tiny-llama")
    again = run("sae", "train", texts_file, *options, "--out", tmp_path / "again")
    assert again.out.replace("again", "saes") == ran.out
    assert same_saes(*({1: tmp_path / name / "layer_1"} for name in ("saes", "again")))


def test_the_command_line_prints_a_table_and_takes_a_range_of_layers(
    run: Run, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--layers", "0-1", "--framings", "raw,answer", *SMALL)
    ran = run("sae", "train", texts_file, texts_file, *options, "--out", tmp_path / "saes[a]")
    assert ran.code == 0, ran.err
    heading, *lines = ran.out.splitlines()
    assert heading.split()[:2] == ["Layer", "Folder"] and "Explained variance" in heading
    rows: list[list[str]] = []
    for words in map(str.split, lines):
        if len(words) == 1:
            rows[-1][1] += words[0]  # a folder's name may take several lines
        else:
            rows.append(words)
    for layer, row in zip((0, 1), rows, strict=True):
        folder = tmp_path / "saes[a]" / f"layer_{layer}"
        figures = [measures_of(folder)[key] for key in ("explained_variance", "l0", "dead", "cross_entropy_recovered")]
        assert row == [str(layer), str(folder), *(f"{figure:.3f}" for figure in figures)]
    assert config(tmp_path / "saes[a]" / "layer_0")["metadata"]["training"]["framings"] == ["raw", "answer"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("--layers", "auto"), ["layers"]),
        (("--layers", "9"), ["9", "0 to 3"]),
        (("--features", "0"), ["features"]),
        (("--active", "41"), ["active", "40"]),
        (("--framings", "raw,chat"), ["chat", "raw, prompt, answer"]),
        (("--learning-rate", "2"), ["learning_rate"]),
        (("--held-out", "1000000"), ["held out", "more texts"]),
    ],
)
def test_the_command_line_refuses_in_one_line(
    run: Run, model_folder: Path, texts_file: Path, tmp_path: Path, changes: tuple[str, ...], words: Any
) -> None:
    options = ("--model", model_folder, "--dtype", "float32", "--layers", "1", *SMALL, "--out", tmp_path / "saes")
    ran = run("sae", "train", texts_file, *options, *changes, "--json")
    assert (ran.code, ran.out) == (2, ""), ran
    (line,) = [line for line in ran.err.splitlines() if line.startswith("neurosteer: ")]
    assert all(word in line for word in words), line
    assert not (tmp_path / "saes").exists()


def test_the_command_line_refuses_texts_that_cannot_be_read(run: Run, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for file in ("bad.jsonl", "missing.txt"):
        ran = run(
            "sae",
            "train",
            tmp_path / file,
            "--model",
            model_folder,
            "--layers",
            "1",
            *SMALL,
            "--out",
            tmp_path / "saes",
        )
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("neurosteer: ") and file in ran.err and len(ran.err.splitlines()) == 1
