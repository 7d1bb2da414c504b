"""The table of packages in docs/design.md is true: files import only from what stands before them, in short chains."""

import ast
import functools
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sora_jax"
LONGEST_CHAIN = 14  # files
TOP_LEVEL = 6  # files directly in sora_jax/


def order() -> list[str]:
    """Every file in the order of docs/design.md."""
    section = (ROOT / "docs" / "design.md").read_text().split("\n## Packages\n")[1].split("\n## ")[0]
    files = []
    for package, row in re.findall(r"^\| (`\w+/`|the public API) \|(.*)\|$", section, re.MULTILINE):
        folder = "" if package in ("`sora_jax/`", "the public API") else package.strip("`")
        files += [f"{folder}{name.strip()}.py" for name in row.replace("\\", "").split(",")]
    return files


def sources() -> dict[str, pathlib.Path]:
    """Every file of the package by its name in the table; of the `__init__.py` only the public API's."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in paths.items() if not name.endswith("/__init__.py")}


def imported(source: str) -> set[str]:
    """The package's files that `source` imports anywhere, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
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
    assert sorted(order()) == sorted(sources())


def test_a_file_imports_only_what_stands_before_it():
    place = {name: index for index, name in enumerate(order())}
    wrong = [
        f"{name} imports {other}, which stands after it"
        for name, path in sources().items()
        for other in imported(path.read_text())
        if place[other] >= place[name]
    ]
    assert not wrong, "; ".join(wrong)


def test_chains_of_imports_are_short():
    imports = {name: imported(path.read_text()) for name, path in sources().items()}

    @functools.cache
    def chain(name: str) -> tuple[str, ...]:
        return (name, *max(map(chain, imports[name]), key=len, default=()))

    longest = max(map(chain, imports), key=len)
    assert len(longest) <= LONGEST_CHAIN, " imports ".join(longest)


def test_few_files_stand_outside_of_a_package():
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_LEVEL


def test_nothing_is_exported_again_but_by_the_face():
    for path in PACKAGE.rglob("__init__.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)
        assert path.parent == PACKAGE or not imports, f"{path} imports"


def test_every_way_of_importing_is_seen():
    source = """
import sora_jax.errors
from sora_jax import config, __version__
from sora_jax.models import dit
def inside():
    from sora_jax.distributed.mesh import make_mesh
"""
    seen = {"errors.py", "config.py", "__init__.py", "models/dit.py", "distributed/mesh.py"}
    assert imported(source) == seen
