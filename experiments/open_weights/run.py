"""Open weights here and by diffusers, side by side: python run.py WHOLE CUT --torch PYTHON [--case CASE] [--json OUT].

WHOLE is a folder of true shapes (`tools/parity/true_shapes.py WHOLE`), CUT one of true width with four layers and no
text encoder (`… CUT --layers 4 --no-text`). Each case runs in a process of its own, ours and theirs in turn, in each
type; of each side the best type counts. Prints a table of ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

from cases import FORWARD, QUEUES, tokens

HERE = pathlib.Path(__file__).resolve().parent
WHOLE = ("first-step", "generate")
CASES = (*FORWARD, "decode", *QUEUES, *WHOLE)
TYPES = ("float32", "bfloat16")


def main() -> None:
    """Runs the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("whole", type=pathlib.Path)
    parser.add_argument("cut", type=pathlib.Path)
    parser.add_argument("--torch", required=True, help="a Python with PyTorch and diffusers")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", action="append", choices=TYPES)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    rows = {}
    for case in given.case or CASES:
        folder = given.whole if case in WHOLE else given.cut
        # The whole model in float32 is more than 24 GB in diffusers.
        types = given.dtype or (["bfloat16"] if case in WHOLE else TYPES)
        runs: dict[str, list[dict[str, float]]] = {}
        for _ in range(1 if case in WHOLE else given.rounds):
            for dtype in types:
                for side, python in (("ours", sys.executable), ("peer", given.torch)):
                    runs.setdefault(f"{side} {dtype}", []).append(run(python, side, case, folder, dtype))
        best = {
            side: min(
                (
                    least(rows) | {"dtype": name.split()[1]}
                    for name, rows in runs.items()
                    if name.startswith(side)
                ),
                key=lambda row: row["seconds"],
            )
            for side in ("ours", "peer")
        }
        rows[case] = {"runs": runs, "best": best}
        own, other = best["ours"], best["peer"]
        ratios = [other[key] / own[key] for key in ("seconds", "processor")]
        print(
            f"{case:14} {own['seconds']:8.2f} s ({own['dtype']})  {other['seconds']:8.2f} s ({other['dtype']})  "
            f"{ratios[0]:5.2f} times as fast, by processor time {ratios[1]:5.2f}, "
            f"peak {own['peak']:.2f} and {other['peak']:.2f} GB{told(case)}",
            flush=True,
        )
        if given.json:
            note = {"machine": machine(), "cases": rows}
            given.json.write_text(json.dumps(note, indent=1) + "\n")


def told(case: str) -> str:
    """Tokens of the requests of a queue."""
    return f", tokens {', '.join(str(tokens(*each)) for each in QUEUES[case])}" if case in QUEUES else ""


def least(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Of each figure the least."""
    return {key: min(row[key] for row in rows) for key in rows[0]}


def run(python: str, side: str, case: str, folder: pathlib.Path, dtype: str) -> dict[str, float]:
    """One process's figures."""
    paths = [HERE, HERE.parents[1], HERE.parents[1] / "tools" / "parity"] if side == "ours" else [HERE]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "JAX_PLATFORMS": "cpu", "SORA_JAX_TEXT_STATES": ""}
    command = [python, str(HERE / f"{side}.py"), case, str(folder), dtype]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {"processor": model, "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
