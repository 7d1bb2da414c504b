"""The table of claims is what the experiments' files say."""

import json
import pathlib
import runpy

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
CLAIMS = runpy.run_path(str(EXPERIMENTS / "claims.py"))


def test_pages_are_made_of_the_files():
    for path, page in CLAIMS["pages"]().items():
        assert path.read_text() == page, f"{path}: run python experiments/claims.py"


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


def test_a_sweep_s_figures_come_from_its_rows(tmp_path):
    rows = [
        {
            "status": "done", "index": n, "labels": {"sizes": arm, "seed": str(seed)}, "sweep_key": "k",
            "metrics": {"64 px/loss": loss}, "tokens": 1, "flops": 1, "processor_seconds": 1,
        }
        for n, (arm, seed, loss) in enumerate([("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 2.0), ("b", 1, 4.2)])
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Student's t of one degree of freedom is 12.706; deviations are √2 and 0.1·√2, over √2.
    assert CLAIMS["fill"]("{mean:a/64 px/loss}", tmp_path) == "2 ± 13"
    assert CLAIMS["fill"]("{difference:b - a/64 px/loss}", tmp_path) == "1.1 ± 1.3"
    page = CLAIMS["with_tables"]("See\n<!-- table: loss -->\nold\n<!-- /table -->\nend", tmp_path)
    assert "old" not in page and "| b | 2 | 3 ± 14 |" in page and page.endswith("<!-- /table -->\nend")
    assert CLAIMS["with_tables"](page, tmp_path) == page
