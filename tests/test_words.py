"""Documents, help texts and messages are in the plain words of the field."""

import ast
import json
import pathlib
import re
from collections.abc import Iterator

import click

from sora_jax.cli.main import cli

ROOT = pathlib.Path(__file__).parents[1]
BANNED = re.compile(
    r"\b(reckon(s|ed|ing)?|anew|aloud|in\s+vain|laid|somebody|whoever|studio|overrul(e|es|ed)|painted)\b",
    re.IGNORECASE,
)


def written() -> Iterator[tuple[str, str]]:
    """Every text that a user or a reader of the documentation sees, with where it stands."""
    documents = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    for path in (*documents, *(ROOT / "configs").rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield str(path.relative_to(ROOT)), "".join(cell["source"])
    for path in (ROOT / "sora_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield str(path.relative_to(ROOT)), node.value
    yield from help_texts(click.Context(cli, info_name="sora-jax"))


def help_texts(context: click.Context) -> Iterator[tuple[str, str]]:
    yield f"{context.command_path} --help", context.get_help()
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            yield from help_texts(click.Context(command, parent=context, info_name=name))


def test_everything_is_written_in_plain_words():
    texts = list(written())
    assert len(texts) > 3000 and any(name == "sora-jax generate --help" for name, _ in texts)
    found = {name: words for name, text in texts if (words := [match[0] for match in BANNED.finditer(text)])}
    assert found == {}
