"""Every configuration builds, its docstring's commands are understood, and nothing in it goes unread."""

import ast
import importlib.util
import pathlib
import re
import shlex

import pytest
from ml_collections import ConfigDict

from sora_jax.errors import UserError
from sora_jax.plan.programs import target_of
from sora_jax.train.__main__ import parse
from sora_jax.train.loop import read_loop_config
from sora_jax.train.objectives import make_objective

ROOT = pathlib.Path(__file__).parents[1]
each_config = pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)


class Watched(ConfigDict):
    """A configuration that notes which of its keys are read."""

    read: set[str]

    def __getitem__(self, key: str):
        type(self).read.add(key)
        return super().__getitem__(key)


def load(path: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def build(config: ConfigDict, workdir: pathlib.Path) -> None:
    """All that training makes of a configuration before it works."""
    read_loop_config(config)
    make_objective(config, workdir)
    if "video" in config:
        assert target_of(config).steps > 0


@each_config
def test_the_docstring_gives_a_command_and_all_its_commands_are_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse(path.read_text()))
    commands = re.findall(r"^ *python -m sora_jax\.train (.+)$", text, re.MULTILINE)
    assert any(f"--config configs/{path.name}" in command for command in commands)
    variants = re.findall(rf"--config (configs/{path.name}:[\w,=]+)", text)
    for command in commands + [f"--config {variant} --workdir runs/x" for variant in variants]:
        config, _, _ = parse(shlex.split(command))
        build(config, tmp_path)


@each_config
def test_every_key_is_read(path, tmp_path):
    config = load(path)
    watched = Watched()
    for key, value in config.items():
        watched[key] = value
    Watched.read = set()
    build(watched, tmp_path)
    assert set(config) - Watched.read == set()


@each_config
def test_no_section_takes_a_key_that_nothing_reads(path, tmp_path):
    sections = [key for key, value in load(path).items() if isinstance(value, ConfigDict)]
    assert sections
    for section in sections:
        config = load(path)
        with config[section].unlocked():
            config[section].nobody_reads_this = 1
        with pytest.raises(UserError, match=rf"config\.{section}\.nobody_reads_this is no key"):
            build(config, tmp_path)


def test_every_field_of_a_component_is_used_somewhere():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "sora_jax").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    fields = {
        f"{schema.name}.{field.target.id}"
        for schema in nodes
        if isinstance(schema, ast.ClassDef) and schema.name.endswith("Config")
        for field in schema.body
        if isinstance(field, ast.AnnAssign)
    }
    assert len(fields) > 40
    assert not sorted(field for field in fields if field.rpartition(".")[2] not in used)
