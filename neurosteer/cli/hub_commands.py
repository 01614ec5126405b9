"""The verbs that publish artifacts on the Hub, fetch them and find them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from neurosteer.cli.choices import Kind
from neurosteer.cli.options import JsonOption, out_option
from neurosteer.cli.output import err, new_table, out, print_json, print_table, progress_line
from neurosteer.cli.places import files_place
from neurosteer.errors import UsageError

_WIDTH = 160


def push(
    places: Annotated[
        list[str], typer.Argument(metavar="DIR... REPO", help="Folders of artifacts, then where to: user/repo.")
    ],
    private: Annotated[bool, typer.Option("--private", help="A new repo is for you alone.")] = False,
    licence: Annotated[str, typer.Option("--license", "--licence", help="The Hub's name of it.")] = "apache-2.0",
    as_json: JsonOption = False,
) -> None:
    """Publish an artifact, or several as a pack, in one commit. Log in with HF_TOKEN or `hf auth login`."""
    from neurosteer import hub

    *folders, repo = places
    if not folders:
        raise UsageError(f"There is only {places[0]!r}; write what to publish, then where to: push ./mood user/mood.")
    _quiet_client()
    with progress_line() as progress:
        what = folders[0] if len(folders) == 1 else folders
        pushed = hub.push(what, repo, private=private, licence=licence, progress=progress)
    if pushed.note:
        err.print(pushed.note)
    if as_json:
        print_json(asdict(pushed))
        return
    out.print(f"Published at {pushed.url} (commit {pushed.commit[:8]}): {', '.join(pushed.files)}.")


def pull(
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="user/repo, user/repo/name, with @revision or not; or its address.")
    ],
    folder: Annotated[Path | None, out_option("a copy; it must be a new one")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only what was pulled before.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch an artifact from the Hub, to use it by its name also offline."""
    from neurosteer import hub

    files_place(folder)
    _quiet_client()
    with progress_line() as progress:
        asked = {"offline": True if offline else None, "progress": progress}
        artifact = hub.pull(reference, **asked) if folder is None else hub.pull_into(reference, folder, **asked)
    place = str(folder) if folder is not None else reference
    if as_json:
        print_json({"artifact": place, "name": artifact.name, "kind": artifact.kind, "model": artifact.model.name})
        return
    out.print(f"Pulled {artifact.name}, a {artifact.kind} for {artifact.model.name}.")
    out.print(f"Try: neurosteer steer --use {place}:1 --prompt 'Tell me a story.' --compare")


def search(
    text: Annotated[str, typer.Argument(help="Words in the repo's name.")] = "",
    base_model: Annotated[str | None, typer.Option(help="Made on this model: catalog name or Hub id.")] = None,
    author: Annotated[str | None, typer.Option(help="A user or an organisation.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only artifacts of this kind.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Find artifacts on the Hub, the most liked first."""
    from neurosteer import hub
    from neurosteer.models.sources import recorded_name

    _quiet_client()
    base = recorded_name(base_model) if base_model else None
    found = hub.search(text, base_model=base, author=author, kind=kind, limit=limit)
    if as_json:
        print_json({"found": [asdict(one) for one in found]})
        return
    if not found:
        out.print("Nothing was found; search with fewer words.")
        return
    table = new_table(("Repo", "Kind", "Made on", "Likes", "Updated", "Description"), right=("Likes",))
    for one in found:
        marks = [word for word, is_so in (("private", one.private), ("gated", one.gated)) if is_so]
        kinds = ", ".join([*one.kinds, *marks])
        table.add_row(one.repo, kinds, one.base_model or "", str(one.likes), one.updated, one.description[:60])
    print_table(table, width=_WIDTH)


def _quiet_client() -> None:
    """The client's own notes on every try stay out of the way: what matters is said by us."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
