"""Publishing, fetching and finding artifacts over HTTP: the real client against the server in `hub_server`."""

from pathlib import Path

from hub_server import FakeHub
from tiny import REFERENCE, make_vector

from neurosteer.hub import pull, push, search
from neurosteer.storage import save


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_pushed_is_found_and_pulled_with_the_same_bytes(hub: FakeHub, tmp_path: Path) -> None:
    vector = make_vector(name="mood", description="A better mood.")
    pushed = push(vector, "alice/mood", licence="mit")
    found = search("mood", model=REFERENCE)
    save(vector, tmp_path / "here")
    save(pull("alice/mood"), tmp_path / "back")
    print(pushed, found)
    assert files_in(tmp_path / "here") == files_in(tmp_path / "back")
