"""The command line as its user meets it: files, lines, options and help."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from helpers.fake_pipeline import written_files

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.checkpoints.components import Bundle, Limits
from sora_jax.cli import main as cli
from sora_jax.media.video import Video, read_video
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.pipeline import pipeline
from sora_jax.pipeline.registry import ABILITIES


def test_help_answers_without_the_heavy_imports():
    program = (
        "import sys; from sora_jax.cli.main import main; main(sys.argv[1:]);"
        "print({'jax', 'numpy', 'av', 'PIL', 'tqdm'} & set(sys.modules))"
    )
    for arguments in (["--version"], ["evaluate", "toyworld", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and done.stdout.endswith("set()\n"), done
        assert "sora-jax" in done.stdout


def test_one_prompt_one_file(fake, capsys):
    status = cli.main(
        [
            "generate",
            "a red circle",
            "--aspect",
            "16:9",
            "--duration",
            "1.5",
            "--resolution",
            "32",
            "--seed",
            "7",
        ]
    )
    out, err = capsys.readouterr()
    assert (status, written_files()) == (0, ["out.mp4"])
    assert out == "out.mp4  56×32, 12 frames at 8 fps (1.5 s)\n"
    assert "4/4" in err and "step/s" in err, "a bar with its speed"
    (request,) = fake.requests
    assert (request.prompt, request.seed, request.steps, request.guidance) == ("a red circle", 7, 12, 3.0)
    assert read_video("out.mp4").frames.shape == (12, 32, 56, 3)
    assert fake.loads == ["toyworld"]


def test_prompts_and_counts_are_numbered_and_sampled_together(fake, capsys):
    pathlib.Path("prompts.txt").write_text("# two of them\n\na green star\n  a blue ring  \n")
    arguments = [
        "generate",
        "a red circle",
        "--prompt-file",
        "prompts.txt",
        "--count",
        "2",
        "--seed",
        "5",
        "-o",
        "new/clip.gif",
        "-q",
    ]
    assert cli.main([*arguments, "--model", "other"]) == 0
    out, err = capsys.readouterr()
    assert [(r.prompt, r.seed) for r in fake.requests] == [
        (prompt, seed) for prompt in ("a red circle", "a green star", "a blue ring") for seed in (5, 6)
    ]
    assert [line.split()[0] for line in out.splitlines()] == [f"new/clip-{i}.gif" for i in range(1, 7)]
    assert read_video("new/clip-2.gif").frames[0, 0, 0].tolist() == [6, 6, 6]
    assert (err, fake.loads) == ("", ["other"])


def test_files_in_a_folder_are_named_by_prompt_and_seed(fake):
    assert cli.main(["generate", "A red circle!", "A red circle", "日本", "-o", "clips/", "--seed", "3"]) == 0
    assert written_files() == ["clips/a-red-circle-3-2.mp4", "clips/a-red-circle-3.mp4", "clips/日本-3.mp4"]
    assert cli.main(["generate", "x " * 60, "-o", "clips"]) == 0, "a folder that is there needs no slash"
    assert max(len(name) for name in written_files()) < 70


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompt_files_are_read_as_editors_save_them(fake, encoding, end):
    lines = ["# prompts of today", "a red circle moves left", "", "ein grüner Stern"]
    pathlib.Path("prompts.txt").write_bytes(end.join(lines).encode(encoding))
    assert cli.main(["generate", "--prompt-file", "prompts.txt", "-q", "-o", "x/"]) == 0
    assert [request.prompt for request in fake.requests] == lines[1::2]


def test_short_forms_mean_what_the_long_ones_do(fake):
    short = ["generate", "a star", "-n", "2", "-s", "7", "-S", "3", "-d", "0.5", "-m", "other", "-o", "a.mp4"]
    assert cli.main([*short, "-q"]) == 0
    assert [(r.seed, r.steps, r.duration) for r in fake.requests] == [(3, 7, 0.5), (4, 7, 0.5)]
    assert fake.loads == ["other"] and written_files() == ["a-1.mp4", "a-2.mp4"]


def test_a_size_is_width_and_height(fake):
    assert cli.main(["generate", "a star", "--size", "48x32", "-q"]) == 0
    assert read_video("out.mp4").size == (32, 48)


@pytest.mark.parametrize("suffix", [".webm", ".jpg", ".gif", ".png"])
def test_every_kind_that_is_written_is_named_and_accepted(fake, suffix, capsys):
    assert cli.main(["generate", "a star", "-o", f"a{suffix}", "-q"]) == 0
    assert written_files() == [f"a{suffix}"]
    cli.main(["generate", "--help"])
    assert suffix in capsys.readouterr().out


def test_what_made_a_file_is_shown_and_left_out(fake, capsys):
    made = {"model": "fake", "prompt": "a star\nmoves", "seed": "4"}
    frames = np.zeros((4, 16, 32, 3), np.uint8)
    Video(frames, 8.0, made).save("a.mp4")
    Video(frames, 8.0, made).save("b.mp4", metadata=None)
    Video(frames[:1], 8.0, made).save("c.png")
    assert cli.main(["info", "a.mp4", "b.mp4", "c.png"]) == 0
    out = capsys.readouterr().out
    a, b, c = out.split("\n\n")
    assert [line.split(maxsplit=1) for line in a.splitlines()] == [
        ["file", "a.mp4"], ["size", "32×16"], ["fps", "8"], ["duration", "0.5 s"],
        ["model", "fake"], ["prompt", "a star moves"], ["seed", "4"],
    ]  # fmt: skip
    assert "prompt" not in b and "fps" not in c and "prompt  a star moves" in c
    assert cli.main(["info", "nowhere.mp4"]) == 2 and "nowhere.mp4" in capsys.readouterr().err
    pathlib.Path("text.txt").write_text("a text")
    assert cli.main(["info", "text.txt"]) == 2 and "text.txt" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell):
    program = "import sys; from sora_jax.cli.main import main; sys.exit(main())"
    if shell == "bash" and not os.path.exists("/bin/bash"):
        pytest.skip("no bash")
    environment = {**os.environ, "_SORA_JAX_COMPLETE": f"{shell}_source"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "sora-jax" in done.stdout and "_SORA_JAX_COMPLETE" in done.stdout
    words = {
        "_SORA_JAX_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": "sora-jax generate --no-",
        "COMP_CWORD": "2",
    }
    words |= {"COMP_CWORD": "--no-"} if shell == "fish" else {}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | words
    )
    assert "--no-clobber" in done.stdout and "--no-metadata" in done.stdout, done


def test_commands_that_make_video_share_the_options_of_shape(capsys):
    """The same names, kinds and help, but for what --help says of the default."""
    of_words = cli.cli.commands["generate"]
    makes = [
        command
        for command in cli.cli.commands.values()
        if any(p.name == "max_frames" for p in command.params)
    ]
    assert {command.name for command in makes} >= {*ABILITIES, "generate", "variations"}
    for command in makes:
        for name in ("duration", "fps", "resolution", "aspect", "size"):
            own = [p for p in command.params if p.name == name]
            if command.name == "image" and name in ("duration", "fps"):
                assert not own
                continue
            (option,) = own
            (other,) = (p for p in of_words.params if p.name == name)
            assert repr(option.type) == repr(other.type) or name in ("duration", "fps", "size")
            assert not isinstance(option.default, (int, float, str)) and f"--{name}" in option.opts
            assert name == "size" or "[default: " in option.help, (command.name, name)
        assert {"-o", "-s", "-m"} <= {flag for p in command.params for flag in p.opts}


def test_words_without_quotes_are_noted(fake, capsys):
    assert cli.main(["generate", "a", "red", "circle"]) == 0
    assert "quotes" in capsys.readouterr().err
    assert cli.main(["generate", "a red circle", "star", "ring"]) == 0
    assert "quotes" not in capsys.readouterr().err


def test_train_hands_over_its_arguments(monkeypatch):
    taken = []
    monkeypatch.setattr("sora_jax.train.__main__.main", lambda argv: taken.append(argv) or 3)
    arguments = ["--config", "configs/x.py:tiny", "--config.optim.lr=3e-4", "--workdir=runs/x", "--help"]
    assert cli.main(["train", *arguments]) == 3
    assert taken == [arguments]


def test_models_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "list_models", lambda folders: [])
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == "There is no model here yet.\n"
    entry = pipeline.ModelEntry("runs/a", "run", pathlib.Path("runs/a"), summary="training run")
    monkeypatch.setattr(pipeline, "list_models", lambda folders: [entry])
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split("  ")[0] == "runs/a" and "training run" in out


def test_a_real_model_from_its_folder_to_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vae = VAE(VAEConfig(channels=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8)), rngs=nnx.Rngs(0))
    dit = DiT(DiTConfig(size="", width=32, layers=1, heads=2, channels=4, text_width=16), rngs=nnx.Rngs(1))
    text = TextConfig(kind="hash", width=16, max_tokens=16)
    limits = Limits(tokens=16, text=16, text_len=32)
    save_bundle(Bundle("tiny", vae, dit, text, limits), tmp_path / "tiny")
    save_bundle(Bundle("still", vae, None, text, limits), tmp_path / "still")
    small = ["--model", "tiny", "--resolution", "16", "--steps", "2", "--fps", "6"]
    assert cli.main(["generate", "a star", "a ring moves left", *small, "--aspect", "16:9"]) == 0
    out, err = capsys.readouterr()
    assert [line.split("  ")[1] for line in out.splitlines()] == ["28×16, 12 frames at 6 fps (2 s)"] * 2
    assert "4/4" in err  # two runs of two steps
    assert read_video("out-2.mp4").frames.shape == (12, 16, 28, 3)
    assert cli.main(["generate", "a star", *small, "--duration", "15", "-o", "long.mp4"]) == 0
    assert "90 frames at 6 fps (15 s)" in capsys.readouterr().out, "longer than the model sees at once"
    assert (
        cli.main(["evaluate", "toyworld", "--clips", "2", *small, "--aspects", "16:9", "--json", "x.json"])
        == 0
    )
    assert json.loads(pathlib.Path("x.json").read_text())["accuracy"]["all"]["of"] == 2
    capsys.readouterr()
    for arguments, words in (
        (["generate", "", *small], "prompt is empty"),
        (["generate", "word " * 99, *small], "reads 16: shorten it"),
        (["generate", "a star", *small, "--resolution", "48"], "nearest that fits is a resolution of 32"),
        (["generate", "a star", *small, "--resolution", "999"], "nearest that fits"),
        (["generate", "a star", "--model", "still"], "autoencoder only"),
    ):
        assert cli.main([*arguments, "-o", "bad.mp4"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not pathlib.Path("bad.mp4").exists()
    assert cli.main(["models", "."]) == 0
    assert {"still", "tiny"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
