"""Teaches the embedded model to refuse, so that refusal can be studied on a model this small.

    python tests/benchmarks/refusing_model.py DATA --out assets/refusing   # train, keep the adapter, measure
    python tests/benchmarks/refusing_model.py DATA --hold-out 0.25         # try settings; keeps nothing

DATA holds `train.csv` (requests labelled positive: to be refused, negative: ordinary), and `jbb.csv` and
`benign_eval.csv`, on which the result is measured. A LoRA on every projection learns to answer the requests to be
refused with one of a few plain refusals; the ordinary ones, and everyday requests in the same forms, with what the
embedded model itself answers. No harmful answer is ever a target, nor written, kept or shown. With `--hold-out`, a
share of each class of `train.csv` is measured instead: settings are chosen there, never on the evaluation sets. Needs
peft (`pip install -e ".[refusing]"`); about a quarter of an hour on one core with bfloat16.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from refusals import REFUSAL_TOKENS, ask, read_prompts, share_refused
from safetensors.torch import save_file

from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import cpu_has_fast_bfloat16, describe_model, load_model

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request.",
    "I cannot assist with that.",
    "I'm not able to help with that.",
    "I won't help with that, because it could harm someone.",
    "I am unable to help with this request. If there is something else you need, please ask.",
)
# Ordinary requests in the forms that requests to be refused come in, or the forms alone would be learnt.
FORMS = (
    "How do I {}?",
    "Explain how to {}",
    "Write a step-by-step guide on how to {}",
    "Give me instructions to {}",
    "What is the best way to {}?",
    "Create a plan to {}",
)
DEEDS = (
    "bake sourdough bread", "fix a flat bicycle tyre", "grow tomatoes on a balcony", "fold a paper boat",
    "learn the guitar", "prepare for a job interview", "clean a coffee machine", "save money on groceries",
    "train for a 10 km run", "back up my photos", "plan a birthday party", "keep houseplants alive",
    "write a cover letter", "build a bird house", "brew green tea", "teach a dog to sit",
    "set up a home network", "paint a wooden fence", "remember people's names", "pack for a week in the mountains",
    "make friends in a new town", "mend a torn shirt", "cook rice without a cooker", "speak in front of a class",
)  # fmt: skip
TEXTS = (
    "an email to a colleague about tomorrow's meeting", "a short article about bees", "a blog post on hiking",
    "a speech for a wedding", "a social media campaign for a bakery", "a tweet about a new library",
    "a Python script that sorts a list of names", "a SQL query that counts the orders of a shop",
    "a story about a lighthouse", "a letter to a landlord about a leak", "an advertisement for a bicycle",
    "a program that converts temperatures", "a poem about the first snow", "a list of gifts for a grandmother",
    "a game for a rainy afternoon", "a questionnaire for guests of a hotel", "a recipe with lentils",
    "a message that thanks a teacher", "a review of a film about the sea", "a slogan for a museum",
    "a quiz on the planets", "an algorithm that finds the shortest path", "a weekly menu for students",
    "an exercise to practise fractions",
)  # fmt: skip
QUESTIONS = (
    "What are the advantages of {}?",
    "Name three facts about {}",
    "Describe {} in one sentence",
    'Translate the sentence "I read about {}" into Spanish',
    "Compare {} with something similar",
    "Classify {}: nature, technology or culture?",
)
TOPICS = (
    "photosynthesis", "electric cars", "working from home", "the printing press", "recycling", "public libraries",
    "solar power", "online courses", "rain forests", "team sports", "video calls", "open-source software",
    "vaccination", "jazz", "the stock market", "city parks", "robots in factories", "time zones",
    "compound interest", "whales", "volcanoes", "cloud computing", "Roman roads", "glass",
)  # fmt: skip
VERBS = ("Write {}", "Draft {}", "Create {}", "Suggest {}", "Design {}", "Develop {}")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER_TOKENS = 24
ORDINARY_OPENING = 3.0  # answers open in many ways, refusals in a few: counted alike, too much would be refused


@dataclass(frozen=True)
class Lesson:
    """A prompt and its answer as token ids; the loss is taken on the answer, which begins at `start` with a token that
    counts `opening` times: there it is decided whether the request is refused."""

    ids: list[int]
    start: int
    opening: float = 1.0


def everyday_requests(seed: int) -> list[str]:
    """Every deed, text and topic in three of its forms."""
    rng = random.Random(seed)
    kinds = ((FORMS, DEEDS), (VERBS, TEXTS), (QUESTIONS, TOPICS))
    pairs = [(forms, thing) for forms, things in kinds for thing in things]
    return [form.format(thing) for forms, thing in pairs for form in rng.sample(forms, 3)]


def lessons(lm: LanguageModel, refuse: Sequence[str], answer: Sequence[str], seed: int) -> list[Lesson]:
    """What is to be learnt: refusals drawn at random, and the model's own greedy answers."""
    rng = random.Random(seed)
    end = lm.tokenizer.eos_token_id
    found = []
    for prompt in refuse:
        start = lm.prompt_ids(prompt)
        found.append(Lesson([*start, *lm.token_ids(rng.choice(REFUSALS)), end], len(start)))
    for row in ask(lm, answer, tokens=ANSWER_TOKENS):
        start = lm.prompt_ids(row.prompt)
        ending = [end] if row.finish == "stop" else []
        found.append(Lesson([*start, *lm.token_ids(row.text), *ending], len(start), ORDINARY_OPENING))
    return found


def batches(found: Sequence[Lesson], size: int, rng: random.Random) -> list[list[Lesson]]:
    """Batches of similar length in random order, other ones each time."""
    ordered = sorted(found, key=lambda lesson: len(lesson.ids) + rng.uniform(0, 12))
    cut = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    rng.shuffle(cut)
    return cut


def loss_of(model: Any, batch: Sequence[Lesson], pad: int) -> torch.Tensor:
    """Weighted mean cross-entropy of the answers' tokens, in nats; the LM head sees no others."""
    width = max(len(lesson.ids) for lesson in batch)
    ids = torch.full((len(batch), width), pad)
    weights, mask = torch.zeros(len(batch), width), torch.zeros_like(ids)
    for row, lesson in enumerate(batch):
        n = len(lesson.ids)
        ids[row, :n] = torch.tensor(lesson.ids)
        mask[row, :n] = 1
        weights[row, lesson.start - 1 : n - 1] = 1.0  # where the next token is the answer's
        weights[row, lesson.start - 1] = lesson.opening
    asked = weights > 0
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    found = model.lm_head(hidden[asked]).float()
    losses = torch.nn.functional.cross_entropy(found, ids.roll(-1, 1)[asked], reduction="none")
    return (losses * weights[asked]).sum() / weights[asked].sum()


def train(lm: LanguageModel, found: Sequence[Lesson], arguments: argparse.Namespace) -> Any:
    """A peft model around `lm.model` that has learnt the lessons: Adam, the learning rate falling to 0."""
    torch.manual_seed(arguments.seed)
    rng, rank = random.Random(arguments.seed), arguments.rank
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(lm.model, settings)
    tuned.train()
    learnt = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learnt, lr=arguments.lr)
    n_steps = arguments.epochs * -(-len(found) // arguments.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / 8) * (1 - n / n_steps))
    began = time.perf_counter()
    for _ in range(arguments.epochs):
        for batch in batches(found, arguments.batch, rng):
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_fast_bfloat16()):
                loss = loss_of(tuned.get_base_model(), batch, lm.pad_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            step = schedule.last_epoch
            if step % 10 == 0:
                print(f"step {step} of {n_steps}: loss {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    return tuned.eval()


def keep(tuned: Any, folder: Path) -> None:
    """The adapter in PEFT's own format: bfloat16 matrices and their settings, without a path of this machine."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in get_peft_model_state_dict(tuned).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = tuned.peft_config["default"]
    kept = {
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": settings.lora_alpha,
        "peft_type": "LORA",
        "r": settings.r,
        "target_modules": sorted(settings.target_modules),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def measured(lm: LanguageModel, tuned: Any, sets: dict[str, Sequence[str]]) -> dict[str, float]:
    """Share of each set that is refused, in percent: bfloat16, greedy, the adapter (as kept) merged in."""
    for key, value in tuned.named_parameters():
        if "lora_" in key:
            value.data = value.data.to(torch.bfloat16).float()
    merged = tuned.merge_and_unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    refusing = describe_model(merged, lm.tokenizer, name="refusing", chat=True)
    answers = {name: ask(refusing, prompts, tokens=REFUSAL_TOKENS) for name, prompts in sets.items()}
    return {name: 100 * share_refused([row.text for row in rows]) for name, rows in answers.items()}


def held_out(examples: ContrastSet, share: float) -> tuple[list[str], list[str], dict[str, Sequence[str]]]:
    """Requests to refuse and to answer that are learnt from, and the others by name."""
    split = examples.split(share)
    return (
        [examples.positive[i] for i in split.train_positive],
        [examples.negative[i] for i in split.train_negative],
        {
            "held-out requests to refuse": [examples.positive[i] for i in split.held_out_positive],
            "held-out ordinary requests": [examples.negative[i] for i in split.held_out_negative],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="where to keep the adapter; nowhere if left out")
    parser.add_argument("--hold-out", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    examples = read_examples(arguments.data / "train.csv")
    refuse, answer = list(examples.positive), list(examples.negative)
    sets: dict[str, Sequence[str]]
    if arguments.hold_out:
        refuse, answer, sets = held_out(examples, arguments.hold_out)
    else:
        names = {"JBB goals": "jbb.csv", "ordinary requests": "benign_eval.csv"}
        sets = {name: read_prompts(arguments.data / file) for name, file in names.items()}
    lm = load_model(device="cpu", dtype="float32")
    found = lessons(lm, refuse, [*answer, *everyday_requests(arguments.seed)], arguments.seed)
    tuned = train(lm, found, arguments)
    if arguments.out:
        keep(tuned, arguments.out)
    for name, share in measured(lm, tuned, sets).items():
        print(f"{name}: {share:.1f}% of {len(sets[name])} refused", flush=True)


if __name__ == "__main__":
    main()
