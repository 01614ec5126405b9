"""The methods by name. Adding one is one file and one line here."""

from neurosteer.errors import UsageError
from neurosteer.methods import caa, cna, pca, probe, sae
from neurosteer.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (caa.METHOD, pca.METHOD, probe.METHOD, sae.METHOD, cna.METHOD)
}


def find_method(name: str) -> Method:
    """The method of this name. Raises `UsageError` naming those there are."""
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]
