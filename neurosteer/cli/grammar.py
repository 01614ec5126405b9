"""How verbs are declared: options that several share come as dataclasses, and help is listed in groups."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from neurosteer.cli.output import set_loudness

OUTPUT = "Output"
_WHOLE = 1000  # the first sentence of a verb's help is listed whole, on several lines where it is long

_QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only results and mistakes, no progress or notes.", rich_help_panel=OUTPUT)
]
_VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Every step on stderr, and where a fault arose.", rich_help_panel=OUTPUT)
]


class Verb(TyperCommand):
    """A command whose help lists its options under the names of their panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options and then each panel, in the order of the declaration."""
        rows = []
        for one in self.get_params(ctx):
            group = "Arguments" if one.param_type_name == "argument" else "Options"
            rows.append((getattr(one, "rich_help_panel", None) or group, one.get_help_record(ctx)))
        _write_groups(formatter, rows)


class Verbs(TyperGroup):
    """A group of commands whose help lists them under the names of their panels."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each panel with its commands, in the order in which they were added."""
        _write_groups(
            formatter,
            [
                (getattr(verb, "rich_help_panel", None) or "Commands", (name, verb.get_short_help_str(_WHOLE)))
                for name, verb in self.commands.items()
            ],
        )


def _write_groups(formatter: Any, rows: Iterable[tuple[str, tuple[str, str] | None]]) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for title, row in rows:
        if row is not None:
            groups.setdefault(title, []).append(row)
    for title, found in groups.items():
        with formatter.section(title):
            formatter.write_dl(found)


def add_verb(
    app: typer.Typer, name: str, function: Callable[..., None], group: str | None = None, **former: str
) -> None:
    """Add `function` as the verb `name`, with --quiet and --verbose.

    `former` maps the names of options as they were (`tokens` for --tokens) to those of today: they are still
    understood, but not listed.
    """

    def run(**given: Any) -> None:
        set_loudness(quiet=given.pop("quiet"), verbose=given.pop("verbose"))
        function(**given)

    more = {"quiet": _QuietOption, "verbose": _VerboseOption}
    names = {
        f"{dashes}{old.replace('_', '-')}": f"{dashes}{new}" for old, new in former.items() for dashes in ("", "--")
    }
    app.command(
        name,
        cls=Verb,
        help=inspect.getdoc(function),
        rich_help_panel=group,
        context_settings={"token_normalize_func": lambda word: names.get(word, word)} if names else None,
    )(flattened(function, run, {name: (annotation, False) for name, annotation in more.items()}))


def flattened(
    function: Callable[..., Any], run: Callable[..., Any], more: Mapping[str, tuple[Any, Any]] | None = None
) -> Callable[..., Any]:
    """A function for Typer that takes what `function` takes, and `more` (annotations and defaults by name), and hands
    it to `run`: where `function` takes a dataclass, its fields are options by themselves."""
    parameters, bundles = [], {}
    for name, one in inspect.signature(function).parameters.items():
        if isinstance(one.annotation, type) and is_dataclass(one.annotation):
            bundles[name] = one.annotation
            hints = get_type_hints(one.annotation, include_extras=True)
            parameters += [_keyword(field.name, hints[field.name], field.default) for field in fields(one.annotation)]
        else:
            parameters.append(_keyword(name, one.annotation, one.default))
    parameters += [_keyword(name, *declared) for name, declared in (more or {}).items()]

    def call(**given: Any) -> Any:
        for name, bundle in bundles.items():
            given[name] = bundle(**{field.name: given.pop(field.name) for field in fields(bundle)})
        return run(**given)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def mistake(error: typer.TyperException) -> str:
    """What is wrong with the words that were typed, the value named. Typer leaves that to pydantic, which leaves the
    value out."""
    said = error.format_message().replace("Value error, ", "").partition(", unable to parse")[0]
    found = getattr(error.__cause__, "errors", list)()
    return said.replace("Input should", f"{str(found[0]['input'])[:60]!r} should") if found else said


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
