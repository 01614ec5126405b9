"""Files of examples, and the sets and prompts that come with NeuroSteer."""

from pathlib import Path

from neurosteer.examples.encodings import decode
from neurosteer.examples.refusing import MAX_BYTES, TOO_LARGE, refuse


def assets_folder() -> Path:
    """The folder of bundled files: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "assets"
    return inside if inside.exists() else package.parent / "assets"


def vectors_folder() -> Path:
    """The folder of the artifacts that come with NeuroSteer, which nothing changes."""
    return assets_folder().parent / "vectors"


def bundled_sets() -> tuple[str, ...]:
    """The names that `read_examples` knows without a file, sorted."""
    return tuple(sorted(path.stem for path in bundled_file("").glob("*.csv")))


def neutral_prompts() -> tuple[str, ...]:
    """Bundled prompts that ask for no behaviour in particular. Raises `ExamplesError` if the file is missing."""
    return bundled_lines("neutral_prompts.txt")


def calibration_prompts() -> tuple[str, ...]:
    """The bundled prompts that strengths are calibrated on, none of them a neutral prompt; half are instructions, half
    openings. Raises `ExamplesError` if the file is missing."""
    return bundled_lines("calibration_prompts.txt")


def sweep_prompts() -> tuple[str, ...]:
    """Sixteen of the neutral prompts, half of them instructions, half openings: what a sweep uses by default."""
    prompts = neutral_prompts()
    return prompts[:8] + prompts[20:28]


def bundled_lines(name: str) -> tuple[str, ...]:
    """The lines of a bundled text file that are not blank. Raises `ExamplesError` if the file is missing."""
    path = bundled_file(name)
    text, _ = decode(read_file(path), path.name)
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def bundled_file(name: str) -> Path:
    return assets_folder() / "examples" / name


def read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            refuse(str(path), "is a folder: name a file in it")
        if not path.exists():
            remedy = f"name a file, one of {', '.join(bundled_sets())}, or a data set on the Hub (user/name)"
            refuse(str(path), f"no such file, nor a bundled set: {remedy}")
        if not path.is_file():
            refuse(str(path), "is not a regular file: save the examples as a CSV or text file")
        if path.stat().st_size > MAX_BYTES:
            refuse(str(path), TOO_LARGE)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        refuse(str(path), f"cannot be read ({reason}): check the path and its permissions")
