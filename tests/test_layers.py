"""The rooms of the library: who may import whom, and what only one module may do."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "neurosteer"

# A room imports from rows above its own and from itself. `neurosteer/README.md` says what each is for.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "text"),
    ("progress", "validation", "processes"),
    ("examples",),
    ("models",),
    ("artifacts",),
    ("steering", "reading"),
    ("saes",),
    ("methods", "measuring"),
    ("building",),
    ("circuits",),
    ("exporting",),
    ("evaluation",),
    ("hub",),
    ("ui",),
    ("cli",),  # below the interface, because one of its verbs starts it
    ("__main__",),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The package's own __init__ only names what others hold, and imports it when first used.
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}


def room(module: str) -> str:
    return module.partition(".")[0]


@cache
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


def ours(module: str) -> set[str]:
    """The modules of the package that `module` imports."""
    return {name.removeprefix("neurosteer.") for name in imported(module) if name.startswith("neurosteer.")}


def calls(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_every_room_has_a_row_and_every_package_says_what_it_is_for() -> None:
    unknown = sorted({room(module) for module in MODULES} - set(ROW_OF))
    assert not unknown, f"new rooms {unknown}: give each a row here and a line in neurosteer/README.md"
    packages = [module for module, path in MODULES.items() if path.name == "__init__.py"]
    silent = [module for module in packages if not ast.get_docstring(tree(module))]
    assert not silent, f"packages without a docstring: {silent}"
    flat = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    known = {"errors", "version", "text", "progress", "validation", "processes", "__main__"}
    assert flat == known, "everything else lies in a package"
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    missing = [name for name in {room(module) for module in packages} if f"`{name}/`" not in readme]
    assert not missing, f"neurosteer/README.md does not name {missing}"


def test_a_room_imports_only_from_rows_above_it() -> None:
    wrong = [
        f"{module} (row {ROW_OF[room(module)]}) imports {name} (row {ROW_OF.get(room(name))})"
        for module in MODULES
        for name in ours(module)
        if room(name) != room(module) and ROW_OF.get(room(name), 99) >= ROW_OF[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_the_package_itself() -> None:
    wrong = [module for module in MODULES if "neurosteer" in set(imported(module))]
    assert not wrong, f"{wrong} import the package itself: import the module that holds the name"


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = {module: ours(module) & set(MODULES) - {module} for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(reversed(error.args[1]))}")


def test_only_the_interface_imports_gradio() -> None:
    wrong = [m for m in MODULES if room(m) != "ui" and "gradio" in {name.split(".")[0] for name in imported(m)}]
    assert not wrong


def test_only_hooks_registers_hooks() -> None:
    registering = [m for m in MODULES if any(c.startswith("register_") and c.endswith("hook") for c in calls(m))]
    assert registering == ["models.hooks"]


def test_the_library_prints_nothing_and_never_unpickles() -> None:
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for module in MODULES:
        assert room(module) == "cli" or "print" not in calls(module), module
        assert not unsafe & {name.split(".")[0] for name in imported(module)}, module
        dangerous = [
            ast.unparse(node.func)
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec")
        ]
        assert not dangerous, module


def test_the_check_itself_sees_imports_in_functions_and_relative_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = tmp_path / "odd.py"
    inside.write_text(
        "def f():\n    from .building.build import build\n    from . import steering\n    import gradio.themes\n"
    )
    monkeypatch.setitem(MODULES, "odd", inside)
    assert set(imported("odd")) == {"neurosteer.building.build", "neurosteer.steering", "gradio.themes"}
    tree.cache_clear()
