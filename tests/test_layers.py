"""The rooms of the library: who may import whom, and what only one module may do."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "neurosteer"

# A module imports only from rows above it. A package stands for all modules in it, unless one is named here too.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "catalog"),
    ("progress", "_examples_parsing"),
    ("examples", "artifacts", "hooks"),
    ("sources", "adapters"),
    ("models", "cards", "plots"),
    ("storage", "activations", "saes", "recipes"),
    ("methods.base", "plans", "decoding", "combining", "twins"),
    (
        "methods.caa",
        "methods.pca",
        "methods.probe",
        "methods.cna",
        "methods.sae",
        "methods.relp",
        "readable",
        "batches",
    ),
    ("methods", "forcing"),
    ("divergence", "preference"),
    ("calibration",),
    ("layer_choice",),
    ("building", "steering", "features", "token_scores"),
    ("evaluation", "circuits", "sae_training", "layer_profile", "lm_harness", "serving"),
    ("hub", "export"),
    ("references",),
    ("ui",),
    ("cli",),  # below the interface, because one of its verbs starts it
    ("__main__",),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
# Packages whose modules may also import one another.
ROOMS_OF_SEVERAL = ("ui", "cli", "hub", "evaluation", "circuits")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The package's own __init__ only names what others hold, and imports it when first used.
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}


def room(module: str) -> str | None:
    """The name under which a module has its row: its own, or that of the package it lies in."""
    if module in ROW_OF:
        return module
    package = module.rpartition(".")[0]
    return room(package) if package else None


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(module: str) -> Iterator[str]:
    """Every module that `module` imports anywhere, also inside functions and for type checking only."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = ["neurosteer", *filter(None, package.split("."))]
                source = ".".join([*above[: len(above) - node.level + 1], *filter(None, [source])])
            for alias in node.names:  # a name may be a module
                inner = f"{source}.{alias.name}".removeprefix("neurosteer.")
                yield f"neurosteer.{inner}" if source.startswith("neurosteer") and inner in MODULES else source


def calls(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_every_module_has_a_row() -> None:
    unknown = [module for module in MODULES if room(module) is None]
    assert not unknown, f"new modules {unknown}: give each a row in tests/test_layers.py and say what it may import"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_above_it(module: str) -> None:
    mine = room(module)
    if mine is None:
        pytest.fail(f"{module} has no row: give it one in tests/test_layers.py")
    for name in imported(module):
        if name == "neurosteer":
            pytest.fail(f"{module} imports the package itself: import the module that holds the name")
        if not name.startswith("neurosteer."):
            continue
        theirs = room(name.removeprefix("neurosteer."))
        assert theirs is not None, f"{module} imports {name}, which has no row"
        if theirs == mine and mine in ROOMS_OF_SEVERAL:
            continue
        assert ROW_OF[theirs] < ROW_OF[mine], f"{module} (row {ROW_OF[mine]}) imports {name} (row {ROW_OF[theirs]})"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_interface_imports_gradio(module: str) -> None:
    if room(module) != "ui":
        assert not [name for name in imported(module) if name.split(".")[0] == "gradio"]


@pytest.mark.parametrize("module", MODULES)
def test_only_hooks_registers_hooks(module: str) -> None:
    registering = [name for name in calls(module) if name.startswith("register_") and name.endswith("hook")]
    assert bool(registering) == (module == "hooks")


@pytest.mark.parametrize("module", MODULES)
def test_the_library_prints_nothing_and_never_unpickles(module: str) -> None:
    assert room(module) == "cli" or "print" not in calls(module)
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not [name for name in imported(module) if name.split(".")[0] in unsafe]
    loads = [
        ast.unparse(node.func)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec")
    ]
    assert not loads


def test_the_check_itself_sees_imports_in_functions_and_relative_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = tmp_path / "odd.py"
    inside.write_text(
        "def f():\n    from .building import build\n    from . import steering\n    import gradio.themes\n"
    )
    monkeypatch.setitem(MODULES, "odd", inside)
    assert set(imported("odd")) == {"neurosteer.building", "neurosteer.steering", "gradio.themes"}
