"""What the repository says is true of it: its documents name real commands and files, and nothing in it is private."""

import ast
import itertools
import pathlib
import re
import shlex
import subprocess

import click
import pytest

import sora_jax
from sora_jax.cli.main import cli
from sora_jax.train.__main__ import parse

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Spelled so that this file doesn't hold them itself.
REGISTRIES = "|".join(
    name.replace(" ", r"\.")
    for name in (
        "pypi org",
        "pythonhosted org",
        "npmjs org",
        "npmjs com",
        "debian org",
        "ubuntu com",
        "crates io",
    )
)
MACHINE = "|".join(f"/{folder}/" for folder in ("root", r"home/\w+", r"Users/\w+", "work", "opt"))
SECRETS = "|".join(
    (
        "-----BEGIN [A-Z ]*PRIVATE" + " KEY",
        r"\bAKIA[0-9A-Z]{16}\b",
        r"\bgh[pousr]_[A-Za-z0-9]{36}\b",
        r"\bhf_[A-Za-z0-9]{30,}\b",
        r"\bsk-[A-Za-z0-9_-]{32,}\b",
        r"://[^/\s:@{}]+:[^/\s:@{}]+@",
    )
)


def tracked() -> dict[str, str]:
    """The text of every text file that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in data:
            texts[name] = data.decode("utf-8", "replace")
    assert len(texts) > 50
    return texts


def visible(document: pathlib.Path) -> str:
    return re.sub(r"<!--.*?-->", "", document.read_text(), flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    """Fenced blocks of README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", visible(ROOT / "README.md"), re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Arguments of every call of `program` in README.md, in blocks and in running text."""
    readme = visible(ROOT / "README.md")
    lines = [line for block in blocks("sh") for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", readme
    )
    calls = [shlex.split(line, comments=True) for line in lines if line.startswith(program + " ")]
    return [words[len(program.split()) :] for words in calls]


@pytest.mark.parametrize("name", ["REGISTRIES", "MACHINE", "SECRETS"])
def test_no_tracked_file_names_registries_machines_or_secrets(name):
    pattern = re.compile(rf"(?<![\w.])(?:{globals()[name]})" if name == "MACHINE" else globals()[name])
    found = {file: match[0] for file, text in tracked().items() if (match := pattern.search(text))}
    assert not found


def test_commands_of_the_readme_exist():
    calls = commands("sora-jax")
    assert {call[0] for call in calls} >= {"generate", "train", "evaluate"}
    for call in calls:
        command: click.Command = cli
        words = iter(call)
        while isinstance(command, click.Group):
            name = next(words)
            if name not in command.commands and hasattr(command, "default"):  # sweep FILE is sweep run FILE
                words, name = itertools.chain([name], words), command.default
            assert name in command.commands, f"sora-jax {shlex.join(call)}"
            command = command.commands[name]
        known = {
            flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        if command.context_settings.get("ignore_unknown_options"):  # keys of a configuration
            words = (word for word in words if not word.startswith("--config."))
        if command.name != "train":
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, shlex.join(call)


def test_training_commands_of_the_readme_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = [call[1:] for call in commands("sora-jax") if call[0] == "train"]
    calls += commands("python -m sora_jax.train")
    assert len(calls) >= 3
    for call in calls:
        parse(call)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for call in commands("make"):
        assert set(call) <= set(targets)


def test_python_of_the_readme_uses_what_the_package_has():
    nodes = [node for block in blocks("python") for node in ast.walk(ast.parse(block))]
    names = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "sora_jax"
    }
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names
    assert all(hasattr(sora_jax, name) for name in names)
    keywords = {keyword.arg for node in nodes if isinstance(node, ast.Call) for keyword in node.keywords}
    assert keywords <= set(sora_jax.Request.__dataclass_fields__)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(document):
    text = visible(document)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in filter(None, links):
        assert (document.parent / link).exists(), link
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "cache", "demo"}
    inside = {path.name for path in (ROOT / "sora_jax").iterdir() if path.is_dir()}
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in code.split():
            first, slash, _ = word.partition("/")
            if slash and first in folders:
                assert (ROOT / word.rstrip(".,:;")).exists(), word
            elif re.fullmatch(r"[\w/]+\.py", word) or (slash and first in inside and word.endswith("/")):
                assert (ROOT / "sora_jax" / word).exists() or (ROOT / word).exists(), word
