"""The metadata of cards, by which the Hub lists, finds and compares artifacts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump

from neurosteer.artifacts.artifact import Artifact
from neurosteer.models.reference import ModelReference
from neurosteer.text import flat
from neurosteer.validation import is_finite

CARD_FILE = "README.md"
LIBRARY = "neurosteer"
"""What cards name as their library and first tag; `search` finds repos by it."""

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


def metadata(artifacts: Sequence[Artifact], licence: str | None) -> str:
    """The Hub's metadata as YAML. `neurosteer` holds what `search` shows of a repo without fetching its artifacts."""
    models = sorted({one.model.name for one in artifacts if HUB_ID.fullmatch(one.model.name)})
    other = licence == "other"  # the Hub wants a name and a link for it
    data = ModelCardData(
        license=licence,
        license_name="see-the-card" if other else None,
        license_link=CARD_FILE if other else None,
        base_model=(models[0] if len(models) == 1 else models) or None,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=[LIBRARY, *sorted({one.kind for one in artifacts})],
        base_model_relation="adapter" if models else None,
    ).to_dict()
    measured = [entry for one in artifacts if (entry := _model_index(one))]
    if measured:
        data["model-index"] = measured
    data[LIBRARY] = {"artifacts": [_summary(one) for one in artifacts]}
    return yaml_dump(data, sort_keys=False, width=1 << 20).rstrip()


def _summary(artifact: Artifact) -> dict[str, Any]:
    model = artifact.model
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "method": flat(artifact.method),
        "description": flat(artifact.description)[:200],
        "base_model": flat(model.name),
        "shape": shape_tag(model),
    }


def shape_tag(model: ModelReference) -> str:
    """Layers, width and MLP width, as cards name a model's shape: '30x576x1536'."""
    return f"{model.n_layers}x{model.d_model}x{model.d_mlp}"


def _model_index(artifact: Artifact) -> dict[str, Any] | None:
    """What receipts say in the Hub's terms, from those that hold `metrics`: a list of `{type, name, value}`, and the
    `dataset` they were measured on: `{type, name}`. Results of no dataset that has a name are left out."""
    results = []
    for receipt in artifact.receipts:
        found = receipt.data.get("dataset")
        dataset = found if isinstance(found, Mapping) else {}
        name = flat(dataset.get("name") or dataset.get("type") or "")
        measured = [
            EvalResult(
                task_type="text-generation",
                dataset_type=flat(dataset.get("type") or name),
                dataset_name=name,
                metric_type=flat(one["type"]),
                metric_name=flat(one.get("name", one["type"])),
                metric_value=one["value"],
            )
            for one in _dicts(receipt.data.get("metrics"))
            if isinstance(one.get("type"), str) and is_finite(one.get("value"))
        ]
        if measured and name:  # by receipt: the client joins those of one type of dataset
            data = ModelCardData(model_name=artifact.name, eval_results=measured).to_dict()
            results += data["model-index"][0]["results"]
    return {"name": artifact.name, "results": results} if results else None


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
