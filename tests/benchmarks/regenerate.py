"""Measure a table of `tests/benchmarks/README.md` again, and put it there in place of the old one.

    python tests/benchmarks/regenerate.py            # the tables there are, and what writes each
    python tests/benchmarks/regenerate.py library calibration [--data DATA]

A table stands between two comments, the first of which says its name and the command that prints it:

    <!-- table calibration: calibration_table.py -->
    <!-- /table -->

In the command, DATA stands for the folder of `--data`. What the command prints on stdout becomes the table: as it is
where it is Markdown, else as plain text.
"""

import argparse
import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).with_name("README.md")
TABLE = re.compile(r"(<!-- table (?P<name>[\w-]+): (?P<command>.+?) -->\n)(?P<content>.*?)(<!-- /table -->)", re.DOTALL)


def tables(text: str) -> dict[str, str]:
    """The command of each table, by name."""
    return {found["name"]: found["command"] for found in TABLE.finditer(text)}


def measured(command: str, data: Path | None) -> str:
    """What `command` prints, ready to stand in the README. Raises `CalledProcessError` where it fails."""
    script, *arguments = shlex.split(command)
    if "DATA" in command and data is None:
        sys.exit(f"{command!r} needs labelled texts: name their folder with --data.")
    arguments = [argument.replace("DATA", str(data)) for argument in arguments]
    run = [sys.executable, str(README.with_name(script)), *arguments]
    printed = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    body = printed if "\n|---" in printed else f"```text\n{printed}\n```"
    return f"{body}\n\nMeasured on {datetime.date.today()} by `{command}`.\n"


def replaced(text: str, name: str, content: str) -> str:
    """`text` with the table `name` holding `content`."""
    return TABLE.sub(lambda found: found[1] + content + found[5] if found["name"] == name else found[0], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables to measure again; without any, all are listed")
    parser.add_argument("--data", type=Path, help="folder of labelled texts, what DATA stands for")
    arguments = parser.parse_args()
    known = tables(README.read_text(encoding="utf-8"))
    for name in arguments.names:
        if name not in known:
            parser.error(f"There is no table {name!r}; there are {', '.join(known)}.")
        content = measured(known[name], arguments.data)  # minutes: what somebody edits meanwhile stays
        README.write_text(replaced(README.read_text(encoding="utf-8"), name, content), encoding="utf-8")
    if not arguments.names:
        print("\n".join(f"{name:24} {command}" for name, command in known.items()))


if __name__ == "__main__":
    main()
