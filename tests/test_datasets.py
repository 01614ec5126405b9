"""Data sets on a Hub of our own, asked over HTTP by the real client: which file, how large, from the cache."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run
from hub_server import FakeHub, File
from huggingface_hub import scan_cache_dir

from neurosteer.errors import HubError, HubUnreachable, NeuroSteerError, UsageError
from neurosteer.examples.columns import Columns
from neurosteer.examples.reading import parse_examples
from neurosteer.hub.datasets import is_dataset, parse_dataset, read_dataset
from neurosteer.hub.pulling import cache_folder

ROWS = {"sentence": ["good", "fine", "bad", "poor"], "label": [1, 1, 0, 0], "idx": [0, 1, 2, 3]}
PAIRS = b"prompt,chosen,rejected\np,a,b\nq,c,d\n"


def parquet(columns: dict[str, list[object]] | None = None) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns or ROWS), out)
    return out.getvalue()


@pytest.fixture
def sst2(hub: FakeHub) -> FakeHub:
    files = {
        f"data/{split}-00000-of-00001.parquet": parquet({**ROWS, "idx": [place] * 4})
        for place, split in enumerate(("test", "train", "validation"))
    }
    hub.put("datasets/some/sst2", {**files, "README.md": b"# SST-2", "dataset_infos.json": b"{}", "sst2.py": b"evil()"})
    return hub


def downloads(hub: FakeHub) -> list[str]:
    return [request.matched["path"] for request in hub.requests if request.route == "resolve"]


def test_a_name_is_the_one_file_of_the_training_split(sst2: FakeHub) -> None:
    found = read_dataset("some/sst2")
    assert (found.positive, found.negative, found.name) == (("good", "fine"), ("bad", "poor"), "sst2")
    assert found.sha256 == parse_examples(parquet(), filename="x").sha256
    assert downloads(sst2) == ["data/train-00000-of-00001.parquet"], "nothing else, and no code of theirs"
    assert found.source == (
        "hf://datasets/some/sst2, train-00000-of-00001.parquet: Parquet, columns sentence and label"
    )
    read_dataset("some/sst2:validation", name="dev")
    assert downloads(sst2)[1:] == ["data/validation-00000-of-00001.parquet"]


def test_a_file_is_read_by_its_address_at_a_revision(hub: FakeHub) -> None:
    repo = hub.put("datasets/lab/pairs", {"v1/pairs.csv": PAIRS})
    old = repo.head.oid
    hub.put("datasets/lab/pairs", {"v1/pairs.csv": PAIRS.replace(b"a,b", b"new,b")})
    addresses = (
        f"hf://datasets/lab/pairs/v1/pairs.csv@{old}",
        f"hf://datasets/lab/pairs@{old}/v1/pairs.csv",
        f"https://huggingface.co/datasets/lab/pairs/blob/{old}/v1/pairs.csv",
    )
    for address in addresses:
        assert read_dataset(address).positive == ("a", "c")
    found = read_dataset("hf://datasets/lab/pairs/v1/pairs.csv", columns=Columns(prompt="prompt"))
    assert found.positive == ("new", "c") and found.positive_prompts == ("p", "q")
    assert read_dataset("lab/pairs").positive == ("new", "c"), "the only file there is"


def test_what_was_read_before_is_read_without_the_hub(sst2: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_dataset("some/sst2")
    asked = len(sst2.requests)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert read_dataset("some/sst2") == first
    assert read_dataset("hf://datasets/some/sst2/data/train-00000-of-00001.parquet") == first
    with pytest.raises(HubUnreachable, match="some/sst2:test was not read before, so it cannot be read offline"):
        read_dataset("some/sst2:test")
    with pytest.raises(HubUnreachable):
        read_dataset("some/sst2", token="hf_bob")
    assert len(sst2.requests) == asked


@pytest.mark.parametrize("named", ["some/files", "some/files:train", "hf://datasets/some/files@{commit}"])
def test_another_file_in_the_cache_is_never_taken_for_the_split_that_is_meant(
    hub: FakeHub, quick: list[float], named: str
) -> None:
    other = PAIRS.replace(b"a,b", b"other,b")
    commit = hub.put("datasets/some/files", {"train.csv": PAIRS, "test.csv": other, "v2/train.csv": other}).head.oid
    named = named.format(commit=commit)
    for path in ("test.csv", "v2/train.csv"):
        assert read_dataset(f"hf://datasets/some/files/{path}@{commit}").positive == ("other", "c")
        read_dataset(f"hf://datasets/some/files/{path}")
        with pytest.raises(HubUnreachable, match="was not read before, so it cannot be read offline"):
            read_dataset(named, offline=True)
    hub.fail("info", status=503, times=9)
    with pytest.raises(HubUnreachable):
        read_dataset(named)
    hub.faults.clear()
    with pytest.raises(HubError, match="'train' of some/files has 2 files"):
        read_dataset(named)


def test_a_reference_without_a_path_is_the_file_that_it_was_even_after_others_were_read(hub: FakeHub) -> None:
    commit = hub.put("datasets/some/files", {"train.csv": PAIRS, "test.csv": PAIRS.replace(b"a,b", b"t,b")}).head.oid
    names = ("some/files", "some/files:test", f"hf://datasets/some/files@{commit}")
    first = [read_dataset(name) for name in names]
    assert [one.positive[0] for one in first] == ["a", "t", "a"]
    asked = len(hub.requests)
    assert read_dataset(names[2]) == first[2] and len(hub.requests) == asked, "a commit's files never change"
    hub.put("datasets/some/files", {"train.csv": PAIRS.replace(b"a,b", b"new,b")})
    assert read_dataset("hf://datasets/some/files/train.csv").positive[0] == "new"
    assert [read_dataset(name, offline=True) for name in names] == first
    assert read_dataset("some/files").positive[0] == read_dataset("some/files", offline=True).positive[0] == "new"


def test_the_clients_own_look_at_the_cache_finds_nothing_wrong(sst2: FakeHub) -> None:
    read_dataset("some/sst2")
    read_dataset("some/sst2:validation")
    found = scan_cache_dir(cache_folder())
    assert not found.warnings
    assert [one.nb_files for one in found.repos if one.repo_id == "some/sst2"] == [2]


def test_a_hub_that_fails_is_done_without_where_the_file_is_there(sst2: FakeHub, quick: list[float]) -> None:
    first = read_dataset("some/sst2")
    sst2.fail("info", status=503, times=9)
    assert read_dataset("some/sst2") == first


def test_several_files_of_a_split_are_listed_and_none_is_guessed(hub: FakeHub) -> None:
    data = parquet()
    hub.put("datasets/some/big", {f"data/train-0000{n}-of-00002.parquet": data for n in range(2)})
    hub.put("datasets/some/glue", {"cola/train.parquet": data, "sst2/train.parquet": data, "sst2/train.csv": b"x"})
    with pytest.raises(HubError, match=r"has 2 files: data/train-00000.*; name one, like hf://datasets/some/big/data/"):
        read_dataset("some/big")
    with pytest.raises(HubError, match=r"cola/train\.parquet, sst2/train\.parquet"):
        read_dataset("some/glue")
    assert read_dataset("hf://datasets/some/glue/sst2/train.parquet").positive == ("good", "fine")
    with pytest.raises(HubError, match=r"no file of a split 'dev' that can be read; it has cola/train\.parquet"):
        read_dataset("some/glue:dev")
    hub.put("datasets/some/code", {"code.py": b"", "README.md": b""})
    with pytest.raises(HubError, match="it has no Parquet, CSV or JSON"):
        read_dataset("some/code")
    with pytest.raises(HubError, match=r"has no file 'other\.csv'"):
        read_dataset("hf://datasets/some/code/other.csv")


def test_a_file_that_is_too_large_is_not_downloaded(hub: FakeHub) -> None:
    hub.put("datasets/some/huge", {"train.parquet": File(b"x" * 100, large=True, claimed_size=21 << 20)})
    with pytest.raises(HubError, match=r"train\.parquet of some/huge has 21 MB, and at most 20 MB are read"):
        read_dataset("some/huge")
    assert downloads(hub) == []


def test_a_damaged_file_is_fetched_again_and_never_read(sst2: FakeHub, quick: list[float]) -> None:
    sst2.fail("resolve", "other bytes", times=2)
    with pytest.raises(HubError, match="arrived damaged twice"):
        read_dataset("some/sst2")
    assert read_dataset("some/sst2").positive == ("good", "fine")


def test_private_gated_and_missing_data_sets_are_said_to_be(hub: FakeHub) -> None:
    hub.put("datasets/bob/secret", {"train.csv": PAIRS}, private=True)
    hub.put("datasets/bob/gated", {"train.csv": PAIRS}, gated="manual")
    for name, said in (("secret", "knows no"), ("gated", "is gated"), ("nothing", "knows no")):
        with pytest.raises(HubError, match=f"datasets/bob/{name}") as caught:
            read_dataset(f"bob/{name}")
        assert said in str(caught.value) or "knows no" in str(caught.value)
    assert read_dataset("bob/secret", token="hf_bob").positive == ("a", "c")


@pytest.mark.parametrize(
    "text",
    [
        "sst2", "a/b/c", "hf://user/model", "hf://datasets/a/b/../../c.csv", "hf://datasets/../b", "https://example.com/x",
        "hf://datasets/a/b/x.csv@../../y", "hf://datasets/a--b/c", "a/b:train[:5]", "hf://datasets/a/b/\n.csv", "",
        "hf://datasets/a/b/x.csv@", "hf://datasets/a/b//x.csv@..", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_what_names_no_data_set_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no data set on the Hub"):
        parse_dataset(text)


def test_a_file_here_is_never_taken_for_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_dataset("some/sst2") and is_dataset("some/sst2:validation") and is_dataset("hf://datasets/a/b")
    for text in ("data/mine", "other/mine.csv", "sentiment", "./some/sst2", "a/b/c", "some/mine.PARQUET"):
        assert not is_dataset(text)


def test_the_command_line_builds_from_a_data_set_and_from_columns_that_are_named(
    sst2: FakeHub, run: Run, model_folder: Path, tmp_path: Path
) -> None:
    words = ("the cat sings", "we run home", "a dog never sleeps", "they sing")
    sst2.put("datasets/some/reviews", {"train.jsonl": b"\n".join(
        b'{"review": "%s %d", "stars": %d}' % (word.encode(), n, 5 if n % 2 else 1) for n, word in enumerate(words)
    )})  # fmt: skip
    told = ("--text", "review", "--label", "stars", "--positive", "5", "--drop-conflicts")
    fixed = ("--model", model_folder, "--layers", "1", "--no-calibrate", "--out", tmp_path / "made", "--json")
    ran = run("build", "some/reviews", *told, *fixed)
    assert ran.code == 0, ran.err
    assert '"n_positive": 2' in ran.out and "JSON lines, UTF-8, keys review and stars" in ran.out
    ran = run("build", "some/reviews", *fixed)
    assert ran.code != 0 and "say which columns are the text and the label (--text, --label)" in ran.err
    ran = run("layers", "some/none", *told, "--model", model_folder)
    assert ran.code != 0 and "datasets/some/none" in ran.err
    ran = run("evaluate", "--use", tmp_path / "made", "--text", "review")
    assert ran.code != 0 and "without --examples" in ran.err
    ran = run("evaluate", "--use", tmp_path / "made", "--examples", "some/reviews", *told[:4], "--positive", "4")
    assert ran.code != 0 and "row 2: more than two labels, '4', '1', '5'" in ran.err


def test_every_error_is_one_of_the_librarys(hub: FakeHub, quick: list[float]) -> None:
    hub.put("datasets/some/odd", {"train.parquet": b"PAR1 nonsense", "dev.csv": b"a,b\n1,2\n"})
    for name in ("some/odd", "some/odd:dev"):
        with pytest.raises(NeuroSteerError):
            read_dataset(name)
