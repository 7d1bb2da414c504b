"""A table of our errors against the files that the scripts beside it wrote into OUT.

python tools/parity/compare.py OUT
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
PARTS = ("wan_image", "wan_vae", "ltx_vae", "ltx", "t5", "wan")  # the longest names first
NO_NETWORK = (
    "ltx_pipeline",
    "ltx_schedules",
    "wan_solvers",
    "wan_lora",
    "wan_image_pair",
    "wan_pipeline",
    "t5_sentencepiece",
)  # which the tests compare


def main() -> None:
    """Prints a line an output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    for path in sorted(parser.parse_args().out.glob("*.npz")):
        part = next((part for part in PARTS if path.stem.startswith(part)), None)
        if part is None or path.stem.startswith(NO_NETWORK):
            continue
        with np.load(path) as file:
            arrays = dict(file)
        for name, error in importlib.import_module(f"{part}_check").check(arrays).items():
            print(f"{path.stem:20} {name:28} {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
