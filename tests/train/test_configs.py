"""Every configuration builds, its docstring's commands are understood, nothing in it goes unread, all can be set."""

import ast
import dataclasses
import pathlib
import re
import shlex
import typing

import pytest
from ml_collections import ConfigDict

from sora_jax import values
from sora_jax.cli import main as cli
from sora_jax.config import (
    RENAMED,
    REQUIRED,
    complete,
    component,
    docs_of,
    override,
    sections_of,
    settings,
    types_of,
)
from sora_jax.errors import UserError
from sora_jax.train import config_files
from sora_jax.train.__main__ import make_config, parse
from sora_jax.train.loop_config import read_loop_config
from sora_jax.train.objectives import OBJECTIVES, RUNS, check_run, make_objective, schema_of
from sora_jax.train.target import TargetConfig, target_of

ROOT = pathlib.Path(__file__).parents[2]
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
    return ConfigDict(config_files.load(str(path)))


def build(config: ConfigDict, workdir: pathlib.Path) -> None:
    """All that training makes of a configuration before it works."""
    read_loop_config(config)
    make_objective(config, workdir)
    if config.get("video") is not None:
        assert target_of(config).steps > 0


@each_config
def test_the_docstring_gives_a_command_and_all_its_commands_are_understood(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse(path.read_text()))
    commands = re.findall(r"^ *sora-jax train (.+)$", text.replace("\\\n", " "), re.MULTILINE)
    assert any(f"--config {path.stem}" in command for command in commands)
    variants = re.findall(rf"--config ({path.stem}:[\w,=]+)", text)
    for command in commands + [f"--config {variant} --workdir runs/x" for variant in variants]:
        config, _, _ = parse(shlex.split(command))
        build(config, tmp_path)


@each_config
def test_every_key_is_read(path, tmp_path):
    config = load(path)
    config = complete(schema_of(config), config)
    watched = Watched()
    for key, value in config.items():
        watched[key] = value
    Watched.read = set()
    # Not by make_objective, which checks all that its table names.
    read_loop_config(watched)
    OBJECTIVES[config.objective](watched, tmp_path)
    target_of(watched) if "video" in watched else None
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


def schemas(schema: type) -> set[type]:
    """A dataclass and all below it."""
    return {schema}.union(*map(schemas, sections_of(schema).values()))


def fields_of(schema: type, prefix: str = "") -> list[tuple[str, type, dataclasses.Field]]:
    """(key, dataclass, field) of every field that holds a value, all the way down."""
    found: list[tuple[str, type, dataclasses.Field]] = []
    for field in dataclasses.fields(schema):
        key, section = prefix + field.name, sections_of(schema).get(field.name)
        found += fields_of(section, f"{key}.") if section else [(key, schema, field)]
    return found


def other_value(kind, default):
    """A value of that type, another than the default where there is another."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return next(choice for choice in inner if choice != default)
    if origin is tuple:
        several = 2 if inner[-1] is ... else len(inner)
        of = [inner[0]] * several if inner[-1] is ... else inner
        return tuple(other_value(one, None) for one in of)
    if values.is_mapping(kind):
        return {}
    return {bool: default is not True, int: 3, float: 0.625, str: "other"}[kind]


def test_every_component_belongs_to_a_run():
    """A component that no run's schema has could not be set: its keys would be refused."""
    named = {
        node.name
        for path in (ROOT / "sora_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }
    reached = {schema.__name__ for run in RUNS.values() for schema in schemas(run)}
    # The first is the common part of all runs; the second is TFDS's; the others are of published models, whose folders
    # have them.
    published = {"LTXConfig", "LTXVAEConfig", "T5Config", "TAEHVConfig", "WanConfig", "WanVAEConfig"}
    assert named - reached == {"LoopConfig", "ToyworldConfig"} | published


@pytest.mark.parametrize("objective", RUNS)
def test_every_field_of_every_component_is_set_on_the_command_line(objective):
    schema, given = RUNS[objective], {"objective": objective, "steps": 5}
    keys = fields_of(schema)
    assert len(keys) > 50
    for key, group, field in keys:
        kind = types_of(group)[field.name]
        for value in (other_value(kind, field.default), field.default):
            if value not in (REQUIRED, None):
                changed = complete(schema, override(schema, given, {key: values.write(value)}))
                for part in key.split("."):
                    changed = changed[part]
                assert values.fixed(changed) == value or changed.to_dict() == value, key


@pytest.mark.parametrize("objective", RUNS)
def test_every_field_is_filled_in(objective):
    shown = {one.key for one in settings(RUNS[objective], {"objective": objective, "steps": 5})}
    absent = {key for key, _, _ in fields_of(RUNS[objective])} - shown
    # The patches are the transformer's; the planner's clip may be none.
    assert {key for key in absent if not key.startswith("video.")} <= {"pipeline.patch", "pipeline.coords"}


@pytest.mark.parametrize("objective", RUNS)
def test_every_field_says_what_it_means(objective):
    silent = [key for key, group, field in fields_of(RUNS[objective]) if not docs_of(group).get(field.name)]
    assert not silent


@pytest.mark.parametrize("objective", RUNS)
def test_the_table_of_runs_is_what_the_objectives_read(objective, tmp_path):
    config = complete(RUNS[objective], {"objective": objective, "steps": 5})
    built = {type(part) for part in vars(make_objective(config, tmp_path)).values()}
    run = RUNS[objective]
    own = set(sections_of(run).values()) - set(sections_of(run.__base__).values())
    assert own - built <= {TargetConfig}  # the planner reads that


@each_config
def test_filling_in_defaults_changes_nothing(path, tmp_path):
    config = load(path)
    full = complete(schema_of(config), config)
    assert complete(schema_of(full), full).to_dict() == full.to_dict()
    assert read_loop_config(full) == read_loop_config(config)
    before, after = (OBJECTIVES[config.objective](one, tmp_path) for one in (config, full))
    for name, part in vars(before).items():
        if dataclasses.is_dataclass(part) and name != "data_config":
            assert getattr(after, name) == part
    assert dataclasses.replace(after.data_config, world={}) == dataclasses.replace(
        before.data_config, world={}
    )


@each_config
@pytest.mark.parametrize("way", ["json", "flags", "folder"])
def test_a_configuration_that_is_shown_can_be_given_back(path, way, tmp_path, capsys):
    changes = ["--config.seed=7", "--config.optim.b2=0.95", "--config.data.world.two_shots", "0.5"]
    changes += ["--config.data.aspects=16:9,4:3", "--config.data.cache=a folder"]
    assert cli.main(["config", path.stem, *changes, "--flags" if way == "flags" else "--json"]) == 0
    shown = capsys.readouterr().out
    if way == "flags":
        again = ["--config", path.stem, *shlex.split(shown)]
    else:
        file = tmp_path / "config.json"
        file.write_text(shown)
        again = ["--config", str(tmp_path if way == "folder" else file)]
    config = parse([*again, "--workdir", "runs/x"])[0]
    assert config == parse(["--config", str(path), *changes, "--workdir", "runs/x"])[0]
    assert (config.seed, config.optim.b2, config.data.world.two_shots) == (7, 0.95, 0.5)


def test_a_configuration_is_shown_whole(capsys):
    assert cli.main(["config", "toyworld_dit:Pico", "--config.dit.patch=1,2,2"]) == 0
    out = capsys.readouterr().out
    lines = {words[1 if words[0] == "*" else 0]: words for words in map(str.split, out.splitlines()) if words}
    config = make_config("toyworld_dit:Pico", {"dit.patch": "1,2,2"})
    for one in settings(schema_of(config), config):
        assert one.key in lines
    assert lines["dit.patch"][:4] == ["*", "dit.patch", "=", "1,2,2"]
    flat = " ".join(out.split())  # lines are as long as the terminal is wide
    assert "3 whole numbers separated by commas: latent cells a token spans" in flat
    assert "[was 1,1,1]" in flat and len(re.findall(r"^ \*", out, re.MULTILINE)) == 1
    assert cli.main(["config", "toyworld_dit", "--flgs"]) == 2
    assert cli.main(["config", "toyworld_dot"]) == 2
    assert "did you mean toyworld_dit?" in capsys.readouterr().err


def test_shipped_configurations_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_config("toyworld_dit:Pico", {}).dit.size == "Pico"
    own = tmp_path / "toyworld_vae.py"
    own.write_text("def get_config():\n    return {'objective': 'vae', 'steps': 3}\n")
    assert make_config("toyworld_vae", {}).steps == 12_000
    assert make_config("toyworld_vae.py", {}).steps == make_config(str(own), {}).steps == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config():\n    return 3\n", "it is int, no table of keys"),
        ("def get_config():\n    raise KeyError('x')\n", "x.py gives no configuration: 'x'"),
        ("import nowhere\n", "No module named 'nowhere'"),
        ("def get_config(:\n", "gives no configuration"),
        ("", "has no attribute 'get_config'"),
        ("def get_config():\n    return {'steps': 3}\n", "config.objective is missing"),
        ("def get_config():\n    return {'objective': 'vae'}\n", "config.steps is missing"),
        (
            "def get_config():\n    return {'objective': 'vae', 'steps': '3'}\n",
            "config.steps takes a whole number",
        ),
        (
            "def get_config():\n    return {'objective': 'vae', 'steps': 3, 'dit': {}}\n",
            "config.dit is no key",
        ),
    ],
)
def test_a_file_that_gives_no_configuration_is_one_sentence(tmp_path, text, words):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(words)):
        make_config(str(tmp_path / "x.py"), {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            "dit.patch=1,2.5,2",
            "config.dit.patch takes 3 whole numbers separated by commas, such as 1,2,2, and got",
        ),
        ("dit.patch=1,2", "config.dit.patch takes 3 whole"),
        ("dit.rope_periods=64,8", "config.dit.rope_periods takes 2 groups of 2 numbers"),
        ("dit.remat=some", "config.dit.remat takes one of all, dots, none"),
        ("dit.absolute=2", "config.dit.absolute takes true or false"),
        ("dit=3", "config.dit is a group of keys: set one of them, such as config.dit.size"),
        (
            "dit.patch.x=3",
            "config.dit.patch.x is no key of this configuration: did you mean config.dit.patch?",
        ),
        ("nothing=3", "config.nothing is no key of this configuration"),
        ("steps=1.5", "config.steps takes a whole number"),
        ("steps=-1", "config.steps=-1 must be at least 1"),
        ("seed=-1", "config.seed=-1 must be from 0"),
        ("seed=99999999999", "config.seed=99999999999 must be from 0 to 4294967295"),
        ("data.seed=-1", "config.data.seed=-1 must be from 0"),
        ("data.resolutions=64,0", "config.data.resolutions=64,0 must be at least 1"),
        ("data.rates=0", "config.data.rates=0.0 must be from 0.01"),
        ("pipeline.batch_size=0", "config.pipeline.batch_size=0 must be at least 1"),
        ("pipeline.temporal_crop_prob=1.5", "config.pipeline.temporal_crop_prob=1.5 must be from 0 to 1"),
        ("latents.batch=-2", "config.latents.batch=-2 must be at least 1"),
        ("flow.text_dropout=2", "config.flow.text_dropout=2.0 must be from 0 to 1"),
        ("log.every=0", "config.log.every=0 must be at least 1"),
        ("log.sheet_every=-5", "config.log.sheet_every=-5 must be at least 0"),
        ("checkpoint.every=0", "config.checkpoint.every=0 must be at least 1"),
        ("checkpoint.keep=0", "config.checkpoint.keep=0 must be at least 1"),
        ("optim.b2=high", "config.optim.b2 takes a number, such as 0.99"),
        ("optim.name=sgd", "config.optim.name takes one of adamw, muon"),
        ("pipeline.canvases.frist=0.5", "did you mean config.pipeline.canvases.first?"),
        ("pipeline.canvases.first=often", "config.pipeline.canvases.first takes a number"),
        ("pipeline.canvases={'frist': 1}", "config.pipeline.canvases.frist is no key: did you mean"),
        ("data.world.objects=0.5,0.5", "config.data.world.objects takes 3 numbers, for one, two, three"),
        ("data.world.two_shot=1", "did you mean config.data.world.two_shots?"),
        ("data.world={'two_shot': 1}", "config.data.world.two_shot is no key"),
        ("video.resolution=64", "config.video.seconds is missing"),
        ("data.resolutions=", "config.data.resolutions is empty"),
    ],
)
def test_a_value_that_a_key_does_not_take_is_answered_with_what_it_takes(change, words):
    key, _, text = change.partition("=")
    with pytest.raises(UserError, match=re.escape(words)):
        make_config("toyworld_dit", {key: text})


def test_mappings_are_set_entry_by_entry_or_whole():
    config = make_config("toyworld_dit", {"pipeline.canvases.first": "0.5", "data.world.leave": "0.25"})
    assert config.pipeline.canvases.first == 0.5 and config.pipeline.canvases.box == 0.08
    assert config.data.world.leave == 0.25 and config.data.world.two_shots == 0.16
    config = make_config("toyworld_dit", {"pipeline.canvases": '{"first": 1}', "data.world": "{}"})
    assert config.pipeline.canvases.to_dict() == {"first": 1.0}
    assert config.data.world.two_shots == 0.1  # its own default
    assert make_config("ladder:S", {"video": "none"}).video is None
    assert make_config("ladder:S", {"video.seconds": "3"}).video.seconds == 3.0


def test_one_setting_under_two_names_must_agree(tmp_path):
    config = make_config("toyworld_dit", {"pipeline.patch": "1,2,2"})
    with pytest.raises(UserError, match=r"config.pipeline.patch is .* set config.dit.patch alone"):
        make_objective(config, tmp_path)
    make_objective(make_config("toyworld_dit", {"pipeline.patch": "1,1,1"}), tmp_path)


def test_components_check_what_python_hands_them():
    schema = RUNS["dit"]
    for name, wrong in (("optim", {"lr": "1"}), ("log", {"every": 2.0}), ("dit", {"patch": (1, 2)})):
        with pytest.raises(UserError, match=rf"config\.{name}\.{next(iter(wrong))} takes"):
            component(sections_of(schema)[name], wrong, name)
    config = complete(schema, {"objective": "dit", "steps": 3})
    config.typo = 1
    with pytest.raises(UserError, match="config.typo is no key"):
        check_run(config)


@pytest.mark.parametrize(
    ("old", "new"), sorted(item for item in RENAMED.items() if not item[0].startswith("limits."))
)
def test_an_old_key_is_answered_with_the_new_one(old, new):
    kind = "vae" if old.startswith("loss.") else "dit"
    with pytest.raises(UserError, match=rf"config\.{old} is called config\.{new} now"):
        override(RUNS[kind], config_files.load(f"toyworld_{kind}"), {old: "1"})
    section, name = old.split(".")
    with pytest.raises(UserError, match=rf"config\.{old} is called config\.{new} now"):
        component(sections_of(RUNS[kind])[section], {name: 1}, section)
