"""Every notebook's code cells run from top to bottom."""

from __future__ import annotations

import json
import pathlib

import pytest

from sora_jax.models.bundle import bundled

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.skipif("toyworld" not in bundled(), reason="the bundled model isn't in this checkout")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path):
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["videos"]
