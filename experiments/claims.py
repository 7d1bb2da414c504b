"""Writes experiments/README.md: every claim that an experiment tested, with figure, interval, cost and verdict.

    python experiments/claims.py            # writes the table
    python experiments/claims.py --check    # exit status 1 where it is not what the claims say

A folder's `claims.json` is a list of claims. `measured` and `interval` may take figures from the folder's JSON or JSONL
files: `{guidance.json:cfg 3, 12/accuracy/all/share|.1%}` is a file, the keys on the way, and a format.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).parent
FIELDS = ("claim", "source", "measured", "interval", "seeds", "compute", "commit", "verdict", "command")
VERDICTS = ("holds", "holds in part", "doesn't hold", "not shown")
HEAD = (
    "# Experiments",
    "One folder a question: prediction, command, table, verdict, and what didn't work. What was tried, by date: "
    "[LOG.md](LOG.md). Small ones run on two CPU cores; a row says what it took. Run `python experiments/claims.py` "
    "after a change: this page is made of the folders' `claims.json`, and a test holds it to them.",
    'Verdicts are about this scale: a small model of a toy world, minutes of two cores. "Not shown" is where figures '
    "are too few to tell.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="The table of claims.")
    parser.add_argument("--check", action="store_true", help="Only compare.")
    check, page, path = parser.parse_args().check, render(), HERE / "README.md"
    if check and (not path.is_file() or path.read_text() != page):
        sys.exit("experiments/README.md is not what the claims say: run python experiments/claims.py.")
    if not check:
        path.write_text(page)


def render() -> str:
    """The page."""
    rows = []
    for folder in sorted(path.parent for path in HERE.glob("*/claims.json")):
        for claim in json.loads((folder / "claims.json").read_text()):
            if set(claim) != set(FIELDS):
                sys.exit(
                    f"{folder.name}/claims.json: a claim has the fields {', '.join(FIELDS)}, not {list(claim)}."
                )
            if claim["verdict"] not in VERDICTS:
                sys.exit(
                    f"{folder.name}/claims.json: the verdict {claim['verdict']!r} is none of {VERDICTS}."
                )
            told = {name: fill(str(value), folder) for name, value in claim.items()}
            cells = [
                f"[{told['claim']}]({folder.name}/README.md)",
                told["source"],
                told["measured"],
                told["interval"],
                told["seeds"],
                told["compute"],
                told["commit"],
                f"**{told['verdict']}**",
                f"`{told['command']}`",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    titles = "claim", "of", "measured", "interval (95%)", "seeds", "compute", "commit", "verdict", "command"
    table = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *rows]
    return "\n\n".join([*HEAD, "\n".join(table)]) + "\n"


def fill(text: str, folder: pathlib.Path) -> str:
    """`text` with the figures of the folder's files in the places of `{file:keys|format}`."""

    def figure(match: re.Match[str]) -> str:
        text = (folder / match["file"]).read_text()
        lines = match["file"].endswith(".jsonl")  # a list of its lines
        value: Any = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        for key in match["keys"].split("/"):
            value = value[int(key) if isinstance(value, list) else key]
        return format(value, match["format"])

    return re.sub(r"\{(?P<file>[\w.]+):(?P<keys>[^}|]+)\|(?P<format>[^}]*)\}", figure, text)


if __name__ == "__main__":
    main()
