"""Writes experiments/README.md: every claim that an experiment tested, with figure, interval, cost and verdict.

    python experiments/claims.py            # writes that page, and the tables of sweeps in the folders' pages
    python experiments/claims.py --check    # exit status 1 where one is not what the files say

A folder's `claims.json` is a list of claims. `measured` and `interval` may take figures from the folder's JSON or JSONL
files: `{guidance.json:cfg 3, 12/accuracy/all/share|.1%}` is a file, the keys on the way, and a format. Of a sweep,
whose rows are in the folder's results.jsonl, `{mean:native/64 px/loss}` is an arm's mean over seeds with its 95%
interval, and `{difference:native - fixed/64 px/loss}` that of the differences from another arm, seed by seed. In a
folder's README.md the sweep's table stands between `<!-- table: loss, colour -->`, which names columns, and
`<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from sora_jax.sweep.results import read_rows
from sora_jax.sweep.table import Table, as_markdown, latest, make_table

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
    parser = argparse.ArgumentParser(description="The table of claims, and those of sweeps.")
    parser.add_argument("--check", action="store_true", help="Only compare.")
    check = parser.parse_args().check
    for path, page in pages().items():
        if check and (not path.is_file() or path.read_text() != page):
            name = path.relative_to(HERE.parent)
            sys.exit(f"{name} is not what its folder's files say: run python experiments/claims.py.")
        if not check:
            path.write_text(page)


def pages() -> dict[pathlib.Path, str]:
    """What each page that has figures of files should be."""
    sweeps = sorted(
        path.parent for path in HERE.glob("*/results.jsonl") if (path.parent / "README.md").is_file()
    )
    return {HERE / "README.md": render()} | {
        folder / "README.md": with_tables((folder / "README.md").read_text(), folder) for folder in sweeps
    }


def with_tables(page: str, folder: pathlib.Path) -> str:
    """`page` with the sweep's newest table between the marks that ask for one."""

    def table(match: re.Match[str]) -> str:
        names = [name.strip() for name in match["metrics"].split(",")]
        return f"{match['begin']}\n\n{as_markdown(_table(folder, names))}\n\n<!-- /table -->"

    pattern = r"(?P<begin><!-- table: (?P<metrics>[^>]*) -->).*?<!-- /table -->"
    return re.sub(pattern, table, page, flags=re.DOTALL)


def _table(folder: pathlib.Path, metrics: Sequence[str] = ()) -> Table:
    return make_table(latest(read_rows(folder / "results.jsonl")), metrics=metrics)


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
    """`text` with the figures of the folder's files in the places of `{file:keys|format}` and of a sweep's marks."""

    def figure(match: re.Match[str]) -> str:
        text = (folder / match["file"]).read_text()
        lines = match["file"].endswith(".jsonl")  # a list of its lines
        value: Any = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        for key in match["keys"].split("/"):
            value = value[int(key) if isinstance(value, list) else key]
        return format(value, match["format"])

    def estimate(match: re.Match[str]) -> str:
        table, metric = _table(folder), match["metric"]
        names = [table.name(arm) for arm in range(len(table.arms))]
        arm, *others = (names.index(name) for name in match["arms"].split(" - "))
        return str(table.difference(arm, *others, metric) if others else table.estimate(arm, metric))

    text = re.sub(r"\{(?:mean|difference):(?P<arms>[^/}|]+)/(?P<metric>[^}|]+)\}", estimate, text)
    return re.sub(r"\{(?P<file>[\w.]+):(?P<keys>[^}|]+)\|(?P<format>[^}]*)\}", figure, text)


if __name__ == "__main__":
    main()
