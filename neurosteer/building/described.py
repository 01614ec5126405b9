"""Examples from a description: what the model itself answers when it is told to, and when it is told the opposite."""

import threading
from collections.abc import Sequence

from neurosteer import processes
from neurosteer.errors import ExamplesError
from neurosteer.examples.contrast_set import MIN_PER_CLASS, ContrastSet, identity
from neurosteer.examples.files import described_prompts
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session
from neurosteer.text import flat
from neurosteer.validation import check_count

MAX_INSTRUCTION = 1000
MAX_SAMPLES = 20
MAX_ANSWER = 200
ANSWER_TOKENS = 48


def asked_to(instruction: str, prompt: str) -> str:
    """A prompt with an instruction before it, as everywhere that the instruction in plain words is compared with."""
    return f"{instruction.strip()} {prompt}"


def described_examples(
    lm: LanguageModel,
    instruct: str,
    against: str,
    *,
    prompts: Sequence[str] | None = None,
    samples: int = 2,
    max_new_tokens: int = ANSWER_TOKENS,
    seed: int = 0,
    name: str = "described",
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> ContrastSet:
    """What the model answers to neutral prompts under an instruction, and under the opposite one, as a contrast set.

    The instructions are not in the set: its texts are answers to the bare prompts, and are read as such, so that what
    is built from them is how the model writes when told to, and not that it was told. Row i of both classes answers the
    same prompt. A row is left out where one of its answers is empty, was there before, or is also in the other class.

    Args:
        instruct: what asks for the behaviour, like "Write like a pirate."
        against: what asks for its opposite or for nothing in particular, like "Write plainly."
        prompts: what to answer; 64 bundled ones by default, none of which calibration or evaluation uses.
        samples: how many answers to each, 1 to 20.
        max_new_tokens: of each answer, 1 to 200.

    Raises:
        UsageError: a number out of its range.
        ExamplesError: an instruction is empty, too long or the same as the other, or hardly any answer differs.
        Cancelled: `cancel` was set.
    """
    check_instructions(instruct, against)
    check_count("samples", samples, 1, MAX_SAMPLES)
    check_count("max_new_tokens", max_new_tokens, 1, MAX_ANSWER)
    bare = [prompt for prompt in prompts or described_prompts() for _ in range(samples)]
    rows = [
        Row(asked_to(instruction, prompt), sample=place % samples)
        for instruction in (instruct, against)
        for place, prompt in enumerate(bare)
    ]
    progress(f"Writing {len(rows)} answers")
    session = Session(lm)
    sampling = Sampling(seed=seed)
    written = processes.shared_out(
        rows,
        lambda mine: session.generate(
            mine, max_new_tokens=max_new_tokens, sampling=sampling, progress=progress, cancel=cancel
        ),
    )
    check_cancelled(cancel, "Writing answers")
    answers = [row.text.replace("\0", "").strip() for row in written]  # which no file of examples may hold
    return _paired(
        bare, answers[: len(bare)], answers[len(bare) :], f"{lm.name}: {flat(instruct)}; {flat(against)}", name
    )


def _paired(
    prompts: Sequence[str], positive: Sequence[str], negative: Sequence[str], source: str, name: str
) -> ContrastSet:
    dropped = {"blank": 0, "duplicate": 0}
    sides: tuple[set[object], set[object]] = (set(), set())
    kept: list[int] = []
    for place, (prompt, *pair) in enumerate(zip(prompts, positive, negative, strict=True)):
        keys = [identity(text, prompt) for text in pair]
        if not all(pair):
            dropped["blank"] += 1
        elif any(key in seen for key in keys for seen in sides) or keys[0] == keys[1]:
            dropped["duplicate"] += 1
        else:
            kept.append(place)
            for key, seen in zip(keys, sides, strict=True):
                seen.add(key)
    if len(kept) < MIN_PER_CLASS:
        raise ExamplesError(
            f"The model answers alike whatever it is told: of {len(prompts)} pairs of answers {len(kept)} differ. "
            "Describe it otherwise, or give examples."
        )
    asked = tuple(prompts[place] for place in kept)
    return ContrastSet(
        tuple(positive[place] for place in kept),
        tuple(negative[place] for place in kept),
        name=name,
        paired=True,
        dropped=dropped,
        source=f"answers of {source}",
        positive_prompts=asked,
        negative_prompts=asked,
    )


def check_instructions(instruct: str, against: str) -> None:
    """Raises `ExamplesError` for instructions that are empty, too long, or the same."""
    for option, text in (("instruct", instruct), ("against", against)):
        if not text.strip():
            raise ExamplesError(f"{option} is empty: say what the model is to do, like “Write like a pirate.”")
        if len(text) > MAX_INSTRUCTION:
            raise ExamplesError(f"{option} has {len(text):,} characters; use at most {MAX_INSTRUCTION:,}.")
    if flat(instruct).strip().casefold() == flat(against).strip().casefold():
        raise ExamplesError("instruct and against are the same: say in against how the model is to write otherwise.")
