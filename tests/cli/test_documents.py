"""docs/abilities.md is true: its commands run in the order in which a reader meets them."""

from __future__ import annotations

import functools
import pathlib
import re
import shlex

import pytest

from sora_jax.cli.main import main
from sora_jax.pipeline import pipeline

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "abilities.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_page_on_abilities_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "load", functools.cache(pipeline.load))  # for all commands once
    (board,) = (block for block in blocks("yaml") if "cards:" in block)
    pathlib.Path("board.yaml").write_text(board)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("sora-jax ")]
    names = {shlex.split(line)[1] for line in lines}
    assert len(names) >= 15
    for line in lines:
        words = shlex.split(line)[1:]
        assert main([*words, "--steps", "1", "--quiet"]) == 0, (line, capsys.readouterr().err)
        output = pathlib.Path(words[words.index("-o") + 1])
        assert output.stat().st_size > 100, line


@pytest.mark.parametrize("name", re.findall(r"^## (\w+)$", PAGE, re.MULTILINE))
def test_every_ability_of_the_page_has_its_picture(name):
    assert f"![{name}](abilities/{name}.png)" in PAGE
