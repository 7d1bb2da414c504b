"""Options by other programs' names: answered with the one that is meant here, from the table of keywords."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from sora_jax.cli import main as cli
from sora_jax.pipeline.keywords import ALIASES
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.shape import Shape
from sora_jax.pipeline.storyboard import Card

MEANT = {
    "generate a --width 64": "it is called --size WxH here; see sora-jax generate --help.",
    "generate a --height=64": "it is called --size WxH here",
    "generate a --num-frames 16": "it is called --frames here",
    "generate a --num_frames 16": "it is called --frames here",
    "generate a --num-inference-steps 9": "it is called --steps here",
    "generate a --guidance-scale 9": "it is called --guidance here",
    "generate a --negative-prompt b": "it is called --negative here",
    "generate a --conditioning_guidance 2": "it is called --conditioning-guidance here",
    "generate a --given-guidance 2": "it is called --conditioning-guidance here",
    "generate --prompt a": "it is called PROMPT (an argument, without --) here",
    "animate --image a.png": "it is called PICTURE (an argument, without --) here",
    "edit --video-path a.mp4": "it is called VIDEO (an argument, without --) here",
    "generate a --resolutoin 9": "did you mean --resolution? See sora-jax generate --help.",
    "generate a --zzz 9": "No such option '--zzz'; see sora-jax generate --help.",
    "plan --topolgy v5e:4x4 --config toyworld_dit": "did you mean --topology? See sora-jax plan --help.",
    "config toyworld_dit --jsn": "No such option '--jsn': did you mean --json?",
    "train --conifg toyworld_dit": "Did you mean '--config'? See sora-jax train --help.",
    "train --config toyworld_dit --steps 9": "A key of the configuration is --config.steps=VALUE.",
    "generat a": "Did you mean 'generate'? See sora-jax --help.",
}


@pytest.mark.parametrize("line", MEANT)
def test_an_unknown_option_is_answered_with_what_it_is_called_here(line, capsys):
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert MEANT[line] in err and err.startswith("error: No such") and err.count("\n") == 1, err


def test_what_the_table_of_names_leads_to_exists():
    known = {field.name for schema in (Shape, Settings, Card) for field in dataclasses.fields(schema)}
    known |= {parameter.name for command in cli.cli.commands.values() for parameter in command.params}
    assert {ours for names in ALIASES.values() for ours in names} <= known


def test_a_new_folder_is_told_from_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a ring", "-o", "newfolder"]) == 2
    err = capsys.readouterr().err
    assert (
        "newfolder is neither an existing folder nor a video file" in err
        and "or in / for a new folder" in err
    )
    pathlib.Path("old").mkdir()
    assert cli.main(["smooth", __file__, "-o", "old"]) == 2
    assert "old can't be written: it is a folder; name a file in it." in capsys.readouterr().err


def test_a_shipped_configuration_is_named_where_its_file_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "configs/toyworld_dit.py", "--workdir", "x"]) == 2
    assert (
        "no configuration file configs/toyworld_dit.py: did you mean toyworld_dit?" in capsys.readouterr().err
    )
    pathlib.Path("mine.py").write_text("")
    assert cli.main(["train", "--config", "mien.py", "--workdir", "x"]) == 2
    assert "did you mean mine.py?" in capsys.readouterr().err
