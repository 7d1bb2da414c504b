"""docs/sweeps.md is true: its sweep can be loaded, its commands are understood, its table is of what there is."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess

import pytest

from sora_jax.cli.main import main
from sora_jax.sweep.points import load, resolve, shipped

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sweeps.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_pages_sweep_is_one(tmp_path):
    [text] = blocks("python")
    (tmp_path / "mine.py").write_text(text)
    points = resolve(load(str(tmp_path / "mine.py")))
    assert len(points) == 6 and points[-1].title == "wide, seed 2" and points[0].config.steps == 400
    assert [one.name for one in points[0].evaluations] == ["128 px", "oracle"]
    assert len(load(f"{tmp_path / 'mine.py'}:debug").points) == 2


def test_the_pages_commands_are_understood(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(r"`(sora-jax sweep [^`]+ [^`]+)`", PAGE)
    commands = [shlex.split(re.split(" > | && ", line)[0], comments=True) for line in lines]
    sweeps = [words[1:] for words in commands if words[0] == "sora-jax"]
    assert len(sweeps) >= 7
    for words in sweeps:
        if words[1] == "table":
            assert (
                main(words) == 2
                and "There are no results in runs/sweeps/resolution" in capsys.readouterr().err
            )
        else:
            printing = {"--print", "--slurm", "--xpk"} & set(words)
            assert main(words if printing else [*words, "--print"]) == 0
            assert "resolution" in capsys.readouterr().out


def test_the_page_lists_every_sweep_that_comes_with_the_package():
    assert set(re.findall(r"^\| \[(\w+)\]\(", PAGE, re.MULTILINE)) == set(shipped())


@pytest.mark.parametrize("words", [[], ["resolutoin"]])
def test_the_script_names_the_ablations(words):
    ran = subprocess.run([ROOT / "experiments" / "reproduce.sh", *words], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("error: there is no ablation")
    assert ran.stderr.split("one of ")[1].split() == sorted(shipped())


def test_the_script_makes_sweep_table_and_plot(tmp_path):
    """With a Python that notes what it is asked."""
    note = tmp_path / "python"
    note.write_text(f'#!/bin/sh\n[ "$1" = -c ] || echo "$@" >> {tmp_path}/asked\n')
    note.chmod(0o755)
    words = ["sigma", "--debug", "--jobs", "2"]
    subprocess.run(
        [ROOT / "experiments" / "reproduce.sh", *words],
        env={"PYTHON": str(note), "PATH": "/usr/bin:/bin"},
        check=True,
    )
    sweep, table = (tmp_path / "asked").read_text().splitlines()
    out = "runs/sweeps/sigma-debug"
    assert sweep == f"-m sora_jax.cli.main sweep sigma --out {out} --debug --jobs 2"
    assert table == f"-m sora_jax.cli.main sweep table {out} --markdown {out}/table.md --plot {out}/table.png"
