"""The table of claims is what the experiments' files say."""

import json
import pathlib
import runpy

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
CLAIMS = runpy.run_path(str(EXPERIMENTS / "claims.py"))


def test_the_page_is_made_of_the_claims():
    assert (EXPERIMENTS / "README.md").read_text() == CLAIMS["render"](), "run python experiments/claims.py"


def test_every_command_and_folder_is_there():
    folders = sorted(EXPERIMENTS.glob("*/claims.json"))
    assert folders
    for file in folders:
        assert (file.parent / "README.md").is_file()
        for claim in json.loads(file.read_text()):
            words = claim["command"].split()
            scripts = [EXPERIMENTS.parent / word for word in words if word.endswith((".py", ".sh"))]
            assert words[0] == "sora-jax" or scripts, claim["command"]
            for script in scripts:
                assert script.is_file(), script


def test_figures_come_from_the_files(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"a, 1": [{"share": 0.4567}]}))
    assert CLAIMS["fill"]("{rows.json:a, 1/0/share|.1%} of clips", tmp_path) == "45.7% of clips"
