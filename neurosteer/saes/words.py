"""Features in words: the tokens they promote, the places where they fire, and whether they move the output at all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neurosteer.artifacts.features import Feature, FeatureContext
from neurosteer.artifacts.vector import unit
from neurosteer.errors import ModelError
from neurosteer.examples.files import neutral_prompts
from neurosteer.models.hooks import OutputHook, hooked
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.models.logits import last_logits
from neurosteer.models.offloading import stored
from neurosteer.models.parts import probe_norm
from neurosteer.reading.loop import frame_texts
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import Activations
from neurosteer.saes.autoencoder import SparseAutoencoder

DESCRIBED = 32
"""How many of an artifact's features, by |weight|, keep their words; the others keep their figures."""

PROMOTED_TOKENS = 8
OUTPUT_SCORE_TOKENS, OUTPUT_SCORE_PROMPTS, OUTPUT_SCORE_DOSE = 20, 4, 0.6
_BEFORE, _AFTER = 12, 6  # tokens of context
_ROWS_AT_ONCE = 64


def describe_features(
    lm: LanguageModel,
    features: Sequence[Feature],
    saes: Mapping[int, SparseAutoencoder],
    activations: Activations,
    texts: Sequence[str],
    request: Request,
    *,
    prompts: Sequence[Prompt] | None = None,
    contexts: int,
) -> tuple[Feature, ...]:
    """The same features with words: of the `DESCRIBED` strongest the tokens promoted and suppressed, a link, and the
    `contexts` places in `texts` where they fire strongest, at most one a text. `prompts` are what the texts answer."""
    ranked = sorted(features, key=lambda feature: -abs(feature.weight))
    strongest = {(feature.layer, feature.index) for feature in ranked[:DESCRIBED]}
    described = []
    for feature in features:
        if (feature.layer, feature.index) in strongest:
            sae = saes[feature.layer]
            promoted, suppressed = promoted_tokens(lm, sae.decoder[feature.index], PROMOTED_TOKENS)
            places = _contexts(lm, feature, activations, texts, request, prompts, contexts)
            link = sae.feature_link(feature.index)
            feature = replace(feature, promoted=promoted, suppressed=suppressed, contexts=places, link=link)
        described.append(feature)
    return tuple(described)


def promoted_tokens(lm: LanguageModel, direction: Tensor, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tokens whose logits `direction` `[d_model]` raises and lowers most, through the final norm's gain (after what
    a LayerNorm does to the mean) and the unembedding (the logit lens)."""
    logits = _through_unembedding(lm, direction[None])[0]
    raised, lowered = logits.topk(count).indices.tolist(), (-logits).topk(count).indices.tolist()
    return tuple(_token_text(lm, token) for token in raised), tuple(_token_text(lm, token) for token in lowered)


def output_scores(lm: LanguageModel, layer: int, directions: Tensor, norm: float) -> Tensor:
    """How much each of `directions` `[n, d_model]` moves the model's output towards the tokens it stands for, `[n]`.

    After arXiv 2505.20063: with P the probability and r the rank (0 the likeliest) of the best-placed of the 20 tokens
    that the direction promotes most through the unembedding, the score is (1 − r/|V|) P with the direction added less
    the same without, at the last token of a neutral prompt; here the mean over a few prompts, the push being
    `OUTPUT_SCORE_DOSE` × `norm`, the median norm of the residual stream.
    """
    standing_for = _through_unembedding(lm, directions).topk(OUTPUT_SCORE_TOKENS).indices
    pushes = torch.stack([unit(direction) for direction in directions]).to(lm.device) * (OUTPUT_SCORE_DOSE * norm)
    total = torch.zeros(len(directions))
    prompts = neutral_prompts()[:OUTPUT_SCORE_PROMPTS]
    for prompt in prompts:
        ids = lm.prompt_ids(prompt)
        nothing = torch.zeros_like(pushes[:1])
        plain = _weighted_best(_pushed_logits(lm, ids, layer, nothing).expand(len(directions), -1), standing_for)
        for rows in torch.arange(len(directions)).split(_ROWS_AT_ONCE):
            logits = _pushed_logits(lm, ids, layer, pushes[rows])
            total[rows] += (_weighted_best(logits, standing_for[rows]) - plain[rows]).cpu()
    return total / len(prompts)


def _weighted_best(logits: Tensor, tokens: Tensor) -> Tensor:
    """(1 − r/|V|) P of the likeliest of each row's `tokens` `[n, k]` under `logits` `[n, vocab]`."""
    best = logits.gather(1, tokens.to(logits.device)).max(1, keepdim=True).values
    ranks = (logits > best).sum(1)
    probabilities = (best[:, 0] - logits.logsumexp(1)).exp()
    return (1 - ranks / logits.shape[1]) * probabilities


def _pushed_logits(lm: LanguageModel, ids: list[int], layer: int, pushes: Tensor) -> Tensor:
    """Logits `[n, vocab]` after the last token, each of `pushes` `[n, d_model]` being added to its residual stream."""

    def push(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += pushes.to(hidden.device, hidden.dtype)
        return hidden

    with torch.inference_mode(), hooked([OutputHook(lm.blocks[layer], push)]):
        return last_logits(lm, [ids] * len(pushes))


def _through_unembedding(lm: LanguageModel, directions: Tensor) -> Tensor:
    """What directions `[n, d_model]` add to the logits, up to a scale; float32 `[n, vocab]`.

    Models that scale or cap their logits leave their order as it is.
    """
    head = stored(lm.model.get_output_embeddings(), "weight")
    if head is None:
        raise ModelError(f"{lm.name}: the weights of its LM head are nowhere to be read.")
    head = head.detach()
    weighed = probe_norm(lm.final_norm, [lm.shape.d_model]).weigh(directions.to(head.device).float())
    return weighed.to(head.dtype).matmul(head.T).float()


def _contexts(
    lm: LanguageModel,
    feature: Feature,
    activations: Activations,
    texts: Sequence[str],
    request: Request,
    prompts: Sequence[Prompt] | None,
    count: int,
) -> tuple[FeatureContext, ...]:
    statistics = activations.features[feature.layer]
    found = []
    for place in range(count):
        strength = float(statistics.strongest[feature.index, place])
        if strength <= 0:
            break
        text = int(statistics.text_of[feature.index, place])
        item = frame_texts(lm, [texts[text]], request, None if prompts is None else [prompts[text]])[0]
        own, token = item.ids[item.start :], int(statistics.token_of[feature.index, place])
        begins = 1 if own[:1] == [lm.tokenizer.bos_token_id] else 0
        parts = own[max(begins, token - _BEFORE) : token], own[token : token + 1], own[token + 1 : token + 1 + _AFTER]
        before, at, after = (lm.tokenizer.decode(part)[:1000] for part in parts)
        found.append(FeatureContext(before, at, after, strength))
    return tuple(found)


def _token_text(lm: LanguageModel, token: int) -> str:
    return lm.tokenizer.decode([token])[:100]
