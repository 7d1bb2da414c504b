"""The table of floors in docs/design.md is true: every file stands in it and imports only from floors below its own."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sora_jax"


def floors() -> dict[str, int]:
    """File to floor, read from docs/design.md."""
    section = (ROOT / "docs" / "design.md").read_text().split("\n## Floors\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", section, re.MULTILINE)
    return {file: int(floor) for floor, files in rows for file in re.findall(r"`([^`]+\.py)`", files)}


def sources() -> dict[str, pathlib.Path]:
    """Every file of the package by its name in the table; of the `__init__.py` only the package's face."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in paths.items() if not name.endswith("/__init__.py")}


def imported(source: str) -> set[str]:
    """The package's files that `source` imports anywhere, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: an import relative to the file's place"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if as_file(inner) else node.module)
    return {file for module in modules if (file := as_file(module))}


def as_file(module: str) -> str | None:
    if module == "sora_jax":
        return "__init__.py"
    file = module.removeprefix("sora_jax.").replace(".", "/") + ".py"
    return file if module.startswith("sora_jax.") and (PACKAGE / file).is_file() else None


def test_the_table_names_the_files_that_there_are():
    assert sorted(floors()) == sorted(sources())


def test_files_import_only_from_floors_below():
    floor = floors()
    wrong = [
        f"{name} (floor {floor[name]}) imports {other} (floor {floor[other]})"
        for name, path in sources().items()
        for other in imported(path.read_text())
        if floor[other] >= floor[name]
    ]
    assert not wrong, "; ".join(wrong)


def test_nothing_is_exported_again_but_by_the_face():
    for path in PACKAGE.rglob("__init__.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
        assert path.parent == PACKAGE or not imports, f"{path} imports"


def test_every_way_of_importing_is_seen():
    source = """
import sora_jax.errors
from sora_jax import video, __version__
from sora_jax.models import dit
def inside():
    from sora_jax.mesh import make_mesh
"""
    assert imported(source) == {"errors.py", "video.py", "__init__.py", "models/dit.py", "mesh.py"}
