"""Frozen dataclasses of what strangers write: held against their types by pydantic, with errors of one line."""

from collections.abc import Callable, Sequence
from dataclasses import field, fields
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from neurosteer.errors import ArtifactError
from neurosteer.text import shown

Record = TypeVar("Record")
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Line = Annotated[str, Field(strict=True, max_length=1000)]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(what: str) -> Callable[[type[Record]], type[Record]]:
    """Make a class a frozen dataclass whose values are held against their types whenever one is made. Its name in
    messages is `what`. Data of a later version may hold more: what is not known is passed over."""

    def decorate(kind: type[Record]) -> type[Record]:
        made: Any = checked_dataclass(kind, frozen=True, config=ConfigDict(extra="ignore"))
        accept, names = made.__init__, [one.name for one in fields(made)]

        def init(self: object, *args: Any, **given: Any) -> None:
            try:
                accept(self, *args, **given)
            except ValidationError as error:
                raise ArtifactError(_refusal(what, names, error)) from error

        made.__init__ = init
        return made

    return decorate


def _refusal(what: str, names: Sequence[str], error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    begin, *inner = first["loc"] or ("keys",)
    place = shown(".".join(map(str, [names[begin] if isinstance(begin, int) else begin, *inner])))[1:-1]
    why = first["msg"][:1].lower() + first["msg"][1:]
    value = "missing" if first["type"] == "missing" else f"{shown(first['input'])}; {why}"
    return f"The {what}'s {place} is {value}."
