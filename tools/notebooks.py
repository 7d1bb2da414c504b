"""Runs the notebooks and keeps what they show.

    python tools/notebooks.py                  # all of them, in full
    python tools/notebooks.py canvas --short   # one, with SHORT = True: under a minute

A notebook's cell tagged `parameters` has its settings, as papermill takes them.
"""

from __future__ import annotations

import argparse
import copy
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
READ = ("experiments", "configs")  # folders of the repository that notebooks read


def main() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description="Run notebooks and keep what they show.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(names)}; none: all.")
    parser.add_argument("--short", action="store_true", help="With SHORT = True.")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(names)):
        parser.error(f"there is no notebook {unknown[0]}: choose from {', '.join(names)}.")
    for name in given.names or names:
        started = time.perf_counter()
        path = FOLDER / f"{name}.ipynb"
        with tempfile.TemporaryDirectory() as scratch:
            made = run(read(path), pathlib.Path(scratch), SHORT=given.short)
        nbformat.write(without_traces(made), path)
        print(f"{name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size // 1024} kB")


def read(path: pathlib.Path) -> Any:
    """A notebook, checked against the format's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(notebook: Any, scratch: pathlib.Path, **parameters: Any) -> Any:
    """The notebook with its outputs, run from top to bottom in a kernel of its own.

    Args:
      scratch: an empty folder, in which it finds what a checkout has, and leaves what it writes.
      parameters: in place of those of its cell tagged `parameters`.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell fails.
    """
    for name in READ:
        (scratch / name).symlink_to(ROOT / name)
    place = scratch / FOLDER.name
    place.mkdir()
    for path in (*FOLDER.glob("*.py"), *FOLDER.glob("*.jsonl")):
        (place / path.name).symlink_to(path)
    notebook = with_parameters(notebook, parameters)
    client = nbclient.NotebookClient(
        notebook, timeout=3600, coalesce_streams=True, resources={"metadata": {"path": str(place)}}
    )
    # The package of this checkout, and the commands installed beside this interpreter.
    paths = {"PYTHONPATH": str(ROOT), "PATH": str(pathlib.Path(sys.executable).parent)}
    env = {
        name: os.pathsep.join(filter(None, [first, os.environ.get(name)])) for name, first in paths.items()
    }
    try:
        client.execute(env=os.environ | env)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return notebook


def with_parameters(notebook: Any, parameters: dict[str, Any]) -> Any:
    """A copy with a cell after the one tagged `parameters`, as papermill adds it."""
    notebook = copy.deepcopy(notebook)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    added = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    place = next(number for number, own in enumerate(tags) if "parameters" in own)
    notebook.cells.insert(place + 1, added)
    return notebook


def without_traces(notebook: Any) -> Any:
    """Without what says when and where it was run: times, versions, the cell that was added; cells are counted.

    Of a picture that comes as PNG and JPEG, as Pillow's do, the smaller one is kept.
    """
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    codes = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(codes, 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if output.output_type == "stream":  # a command's lines end as a terminal's
                output.text = output.text.replace("\r\n", "\n")
            pictures = [kind for kind in output.get("data", {}) if kind in ("image/png", "image/jpeg")]
            for larger in sorted(pictures, key=lambda kind: len(output.data[kind]))[1:]:
                del output.data[larger]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    notebook.cells = cells
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


if __name__ == "__main__":
    main()
