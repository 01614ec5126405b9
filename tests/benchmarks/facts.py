"""Does ablating the circuit behind a fact remove the fact, and nothing else?

For ten plain facts that the model knows: the probability of the right token before and after its relp circuit is
ablated, and after as many random neurons of the same layers are (universal ones spared, as in circuits); and how many
unrelated prompts keep their likeliest next token. The facts are the first ten of a list fixed beforehand whose right
token is the model's top prediction; the other ones it knows, and the beginning of a story, are the unrelated prompts.

    python tests/benchmarks/facts.py [--model NAME] [--neurons 10,46,200] [--draws 5] [--named]
        [--specific] [--swap]

Circuits are found against the best other token; with `--named` against a wrong answer of the same kind. `--specific`
leaves out neurons that everyday answers are owed to as well. `--swap` makes the other known facts the ones ablated, and
these the unrelated prompts.
"""

import argparse
from collections.abc import Sequence

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.circuits import (
    CommonNeurons,
    Selection,
    at_multiplier,
    attribute,
    find_universal,
    find_unspecific,
    next_token_probs,
    random_like,
    top_predictions,
)
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model

Fact = tuple[str, str, str]
"""A prompt, the right token, and a wrong one of the same kind."""

FACTS = (
    ("The capital of France is", " Paris", " London"),
    ("The capital of Italy is", " Rome", " Paris"),
    ("The capital of Japan is", " Tokyo", " Beijing"),
    ("The capital of Germany is", " Berlin", " Paris"),
    ("The capital of Russia is", " Moscow", " Berlin"),
    ("The Eiffel Tower is in the city of", " Paris", " London"),
    ("The opposite of hot is", " cold", " warm"),
    ("The opposite of up is", " down", " left"),
    ("The Great Wall is a famous landmark in", " China", " India"),
    ("The Pyramids of Giza are in", " Egypt", " Mexico"),
    ("The first president of the United States was George", " Washington", " Bush"),
    ("The theory of relativity was developed by Albert", " Einstein", " Newton"),
    ("The play Romeo and Juliet was written by William", " Shakespeare", " Wordsworth"),
    ("Water is made of hydrogen and", " oxygen", " nitrogen"),
    ("The Earth revolves around the", " Sun", " Moon"),
    ("The largest planet in the solar system is", " Jupiter", " Saturn"),
    ("The chemical symbol H stands for", " hydrogen", " helium"),
    ("The day after Monday is", " Tuesday", " Sunday"),
    ("The month after January is", " February", " March"),
    ("The colours of the American flag are red, white and", " blue", " green"),
    ("The language spoken in Spain is", " Spanish", " French"),
    ("The currency of Japan is the", " yen", " dollar"),
    ("The Statue of Liberty is in New", " York", " Orleans"),
    ("Charles Darwin is famous for the theory of", " evolution", " gravity"),
    ("The human body pumps blood with the", " heart", " lungs"),
    ("Bees make", " honey", " wax"),
    ("The frozen form of water is called", " ice", " steam"),
    ("A baby cat is called a", " kitten", " puppy"),
    ("The planet known as the Red Planet is", " Mars", " Venus"),
    ("Christmas is celebrated on the 25th of", " December", " March"),
)
STORY = "Once upon a time, there was a little"
KEPT = 10


def known_facts(lm: LanguageModel) -> list[Fact]:
    """The facts whose right token the model predicts; every one is printed."""
    known = []
    for fact in FACTS:
        prompt, token, _ = fact
        best = top_predictions(lm, prompt, k=1, raw=True)[0]
        if best.text == token:
            known.append(fact)
        verdict = "not known" if best.text != token else "taken" if len(known) <= KEPT else "unrelated"
        print(f"{verdict:10} {prompt!r} -> {best.text!r} {best.probability:.3f} (right: {token!r})")
    return known


def best_tokens(lm: LanguageModel, prompts: Sequence[str], recipe: Recipe = UNSTEERED) -> list[str]:
    return [top_predictions(lm, prompt, recipe, 1, raw=True)[0].text for prompt in prompts]


def measure(
    lm: LanguageModel,
    facts: Sequence[Fact],
    unrelated: Sequence[str],
    size: int,
    draws: int,
    named: bool,
    left_out: CommonNeurons,
) -> None:
    """A table of the facts, each with its circuit of `size` neurons ablated."""
    plain = best_tokens(lm, unrelated)
    print(f"\n{size} neurons ({size / (lm.n_layers * lm.shape.d_mlp):.2%}); {len(unrelated)} unrelated prompts")
    print("| fact | before | circuit ablated | random: mean (least) | unrelated kept | by random | story |")
    print("|---|---|---|---|---|---|---|")
    sums = [0.0] * 5
    for prompt, token, wrong in facts:
        found = attribute(lm, prompt, token, wrong if named else None, raw=True, universal=left_out)
        circuit = found.circuit(select=Selection("top_k", size))
        ablated = at_multiplier(circuit, 0.0)
        randoms = [at_multiplier(random_like(circuit, seed, leave_out=left_out.all), 0.0) for seed in range(draws)]
        recipes = (UNSTEERED, ablated, *randoms)
        before, after, *chance = (next_token_probs(lm, prompt, token, one, raw=True)[token] for one in recipes)
        changed = [best_tokens(lm, unrelated, one) for one in (ablated, randoms[0])]
        kept = [sum(one == other for one, other in zip(plain, row, strict=True)) for row in changed]
        mean = sum(chance) / draws
        sums = [old + new for old, new in zip(sums, (before, after, mean, *kept), strict=True)]
        print(
            f"| {prompt}**{token}** | {before:.3f} | {after:.4f} | {mean:.3f} ({min(chance):.3f}) "
            f"| {kept[0]} | {kept[1]} | {plain[-1]!r} → {changed[0][-1]!r} |",
            flush=True,
        )
    before, after, mean, *kept = (value / len(facts) for value in sums)
    print(f"| mean | {before:.3f} | {after:.4f} | {mean:.3f} | {kept[0]:.1f} | {kept[1]:.1f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--neurons", default="10,46,200")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--specific", action="store_true")
    parser.add_argument("--swap", action="store_true")
    options = parser.parse_args()
    lm = load_model(options.model, device="cpu", dtype="float32")
    known = known_facts(lm)
    facts, others = (known[KEPT:], known[:KEPT]) if options.swap else (known[:KEPT], known[KEPT:])
    left_out = find_unspecific(lm) if options.specific else find_universal(lm)
    unrelated = [*(prompt for prompt, _, _ in others), STORY]
    print(f"\n{len(left_out.all)} neurons are left out of circuits and random draws")
    for size in options.neurons.split(","):
        measure(lm, facts, unrelated, int(size), options.draws, options.named, left_out)


if __name__ == "__main__":
    main()
