"""Finding artifacts on the Hub by the tags of their cards. What repos say of themselves is cut, and nothing more is
believed than is needed to show it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ExpandModelProperty_T, ModelInfo

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.metadata import LIBRARY, shape_tag
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.hub.client import Token, connect
from neurosteer.models.reference import ModelReference
from neurosteer.text import one_line
from neurosteer.validation import check_count, check_option

KINDS = (SteeringVector.kind, NeuronCircuit.kind)
MOST_FOUND = 100
SEARCH_S = 10.0
"""How long one query of a search may take, the client's own further tries included."""

_BASE_MODEL, _LICENCE = "base_model:", "license:"
_DETAILS: list[ExpandModelProperty_T] = ["author", "downloads", "gated", "lastModified", "likes", "private", "tags"]


@dataclass(frozen=True)
class Found:
    """A repo that `search` found. `names` are the artifacts in it, `description` is that of the first, `updated` a date
    like 2026-11-22. `compatible`: whether one of them fits the model asked about, None where that is not known."""

    repo: str
    author: str
    kinds: tuple[str, ...]
    base_model: str | None
    names: tuple[str, ...]
    description: str
    downloads: int
    likes: int
    updated: str
    private: bool
    gated: bool
    compatible: bool | None
    licence: str | None


def search(
    text: str = "",
    *,
    base_model: str | None = None,
    author: str | None = None,
    kind: str | None = None,
    model: ModelReference | None = None,
    limit: int = 20,
    token: Token = None,
) -> list[Found]:
    """Repos on the Hub that hold artifacts, at most `limit`; those that fit `model` come first, then the most liked.

    Args:
        text: words in the repo's name.
        base_model: the Hub id of the model they were made on.
        author: a user or an organisation.
        kind: `steering-vector` or `neuron-circuit`.

    Raises:
        HubError, HubUnreachable: as the Hub answers. UsageError: a kind or a limit that is not allowed.
    """
    if kind is not None:
        check_option("kind", kind, KINDS)
    check_count("limit", limit, 1, MOST_FOUND)
    hub = connect(token)
    tags = [LIBRARY, *([kind] if kind else []), *([_BASE_MODEL + base_model] if base_model else [])]
    wanted = {"search": text.strip()[:200] or None, "author": author or None, "sort": "likes", "limit": limit}
    queries = [tags]
    if model is not None and not base_model and "/" in model.name:
        queries.insert(0, [*tags, _BASE_MODEL + model.name])  # else popular others might take all the places
    infos: dict[str, ModelInfo] = {}
    for query in queries:
        listed = hub.ask("search", lambda api, query=query: _listed(api, query, wanted), seconds=SEARCH_S, tries=1)
        infos |= {info.id: info for info in listed if info.id not in infos}
    found = [_found(info, model) for info in infos.values()]
    return sorted(found, key=lambda one: _rank(one, model))[:limit]


def _listed(api: HfApi, tags: list[str], wanted: Mapping[str, Any]) -> list[ModelInfo]:
    """With what the cards say, unless one of them is so odd that the client stumbles over it: then without."""
    try:
        found = api.list_models(filter=tags, expand=[*_DETAILS, "cardData"], **wanted)
        return list(islice(found, wanted["limit"]))
    except (TypeError, ValueError, AttributeError, KeyError):
        return list(islice(api.list_models(filter=tags, expand=_DETAILS, **wanted), wanted["limit"]))


def _rank(found: Found, model: ModelReference | None) -> tuple[int, int]:
    order = {True: 0, None: 1, False: 2}[found.compatible]
    exact = model is not None and found.base_model == model.name
    return (2 * order - exact, -found.likes)


def _found(info: ModelInfo, model: ModelReference | None) -> Found:
    tags = [tag for tag in info.tags or [] if isinstance(tag, str)]
    artifacts = _artifacts(info)
    bases = [tag.removeprefix(_BASE_MODEL) for tag in tags if tag.startswith(_BASE_MODEL)]
    plain = [base for base in bases if ":" not in base]  # others tell the relation: base_model:adapter:user/repo
    licences = [tag.removeprefix(_LICENCE) for tag in tags if tag.startswith(_LICENCE)]
    return Found(
        repo=info.id,
        author=info.author or info.id.partition("/")[0],
        kinds=tuple(kind for kind in KINDS if kind in tags),
        base_model=_shown(plain[0]) if plain else None,
        names=tuple(_shown(one.get("name")) for one in artifacts),
        description=_shown(artifacts[0].get("description")) if artifacts else "",
        downloads=info.downloads or 0,
        likes=info.likes or 0,
        updated=info.last_modified.date().isoformat() if info.last_modified else "",
        private=bool(info.private),
        gated=bool(info.gated),
        compatible=_fits(artifacts, plain, model),
        licence=_shown(licences[0]) if licences else None,
    )


def _fits(artifacts: Iterable[Mapping[str, Any]], bases: list[str], model: ModelReference | None) -> bool | None:
    if model is None:
        return None
    shapes = [one["shape"] for one in artifacts if isinstance(one.get("shape"), str)]
    if shapes:
        return shape_tag(model) in shapes
    return True if model.name in bases else None


def _artifacts(info: ModelInfo) -> list[Mapping[str, Any]]:
    """What the card's metadata says of the artifacts; nothing where it says it in another form."""
    try:
        listed = info.card_data.get(LIBRARY, {}).get("artifacts", []) if info.card_data else []  # type: ignore[union-attr]
    except AttributeError:
        return []
    return [one for one in listed if isinstance(one, Mapping)][:MOST_FOUND] if isinstance(listed, list) else []


def _shown(value: object) -> str:
    return one_line(value, 200) if isinstance(value, str) else ""
