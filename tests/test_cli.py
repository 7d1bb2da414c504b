"""The command line as its user meets it: files, lines, sentences and exit statuses."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from flax import nnx

from sora_jax import cli, studio
from sora_jax.errors import UserError
from sora_jax.models.bundle import Bundle, Limits, save_bundle
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.models.text import TextConfig
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.video import Video, VideoStream, read_video


class FakeStudio:
    """Answers as `studio.Studio` does, without a network; `before` is called when the sampling begins."""

    name = "fake"

    def __init__(self):
        self.requests, self.before = [], lambda: None

    def check(self, request):
        if len(request.prompt.split()) > 64:
            raise UserError("The prompt has too many tokens.")
        if request.shape()[0] > 100:
            raise UserError("That is too long for this model.")

    def generate_batch(self, requests, progress=None):
        return [stream.whole() for stream in self.stream_batch(requests, progress)]

    def stream_batch(self, requests, progress=None):
        self.requests = list(requests)
        walk = self.walk(progress)
        return [VideoStream(self.frames(r, walk), r.shape()[0], r.shape()[1:], r.fps) for r in requests]

    def walk(self, progress):
        self.before()
        for step in range(1, 5):
            progress(step, 4)
            yield

    def frames(self, request, walk):
        count, *size = request.shape()
        for _ in range(count):
            next(walk, None)
            yield np.full((*size, 3), request.seed, np.uint8)

    def reconstruct(self, video):
        return Video(video.frames // 2 * 2, video.fps)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    model = FakeStudio()
    model.loads = []
    monkeypatch.setattr(studio, "load", lambda name, lazy: model.loads.append(name) or model)
    monkeypatch.chdir(tmp_path)
    return model


def _files():
    return sorted(str(path) for path in pathlib.Path().rglob("*") if path.is_file())


def test_help_answers_without_the_heavy_imports():
    program = (
        "import sys; from sora_jax.cli import main; main(sys.argv[1:]);"
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
    assert (status, _files()) == (0, ["out.mp4"])
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
    assert _files() == ["clips/a-red-circle-3-2.mp4", "clips/a-red-circle-3.mp4", "clips/日本-3.mp4"]
    assert cli.main(["generate", "x " * 60, "-o", "clips"]) == 0, "a folder that is there needs no slash"
    assert max(len(name) for name in _files()) < 70


BAD = {
    "no prompt": (["generate"], "no prompt"),
    "empty prompt": (["generate", "  "], "prompt is empty"),
    "one of them empty": (["generate", "a star", ""], "prompt is empty"),
    "over-long prompt": (["generate", "word " * 99], "too many tokens"),
    "too long a clip": (["generate", "a star", "--duration", "60"], "too long"),
    "aspect": (["generate", "a star", "--aspect", "16:0"], "16:0"),
    "aspect in words": (["generate", "a star", "--aspect", "wide"], "'wide'"),
    "suffix": (
        ["generate", "a star", "-o", "out.avi"],
        "out.avi can't be written: its name must end in .mp4",
    ),
    "no suffix": (["generate", "a star", "-o", "out"], "its name must end in"),
    "a file for a folder": (["generate", "a star", "-o", "file.txt/out.mp4"], "is a file, not a folder"),
    "a file for a folder above": (
        ["generate", "a star", "-o", "file.txt/new/out.mp4"],
        "is a file, not a folder",
    ),
    "a folder that can't be written": (
        ["generate", "a star", "-o", "/proc/out.mp4"],
        "/proc/out.mp4 can't be written",
    ),
    "a name too long": (["generate", "a star", "-o", "x" * 252 + ".mp4"], "too long"),
    "mistyped option": (["generate", "a star", "--resoluton", "64"], "--resolution"),
    "mistyped command": (["generat", "a star"], "generat"),
    "duration": (["generate", "a star", "--duration", "-1"], "-1 is not a number above 0"),
    "duration that is no number": (
        ["generate", "a star", "--duration", "nan"],
        "nan is not a number above 0",
    ),
    "endless duration": (["generate", "a star", "--duration", "inf"], "inf is not a number above 0"),
    "rate": (["generate", "a star", "--fps", "fast"], "'fast' is not a number"),
    "guidance": (["generate", "a star", "--guidance", "inf"], "inf is not a number"),
    "steps": (["generate", "a star", "--steps", "0"], "0 is not in the range"),
    "solver": (["generate", "a star", "--solver", "magic"], "magic"),
    "no prompt file": (["generate", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
    "empty prompt file": (["generate", "--prompt-file", "empty.txt"], "empty.txt has no prompt"),
    "binary prompt file": (["generate", "--prompt-file", "binary.txt"], "binary.txt is not UTF-8 text"),
    "no folder of models": (["models", "nowhere"], "no folder nowhere"),
    "a size in words": (["generate", "a star", "--size", "large"], "'large' is not a size"),
    "an empty size": (["generate", "a star", "--size", "0x10"], "'0x10' is not a size"),
    "a size and a resolution": (
        ["generate", "a star", "--size", "9x9", "--resolution", "9"],
        "--size says all",
    ),
    "too many": (["generate", "a star", "--count", "1000000000"], "not in the range"),
    "a prompt that is no text": (["generate", "a \udcff star"], "prompt is not valid text"),
    "train without a configuration": (["train", "--workdir", "x"], "--config is missing"),
    "train with an unknown flag": (["train", "--config", "nowhere.py"], "nowhere.py"),
    "no video": (["evaluate", "vae", "nowhere.mp4"], "no file nowhere.mp4"),
    "no video named": (["evaluate", "vae"], "FILE"),
    "text for a video": (["evaluate", "vae", "file.txt"], "file.txt can't be read as a video"),
    "figures nowhere": (["evaluate", "vae", "x.mp4", "--json", "file.txt/x.json"], "is a file, not a folder"),
    "figures over a folder": (["evaluate", "vae", "x.mp4", "--json", "folder"], "it is a folder"),
    "sheet": (
        ["evaluate", "toyworld", "--sheet", "sheet.bmp"],
        "sheet.bmp can't be written: its name must end in .png",
    ),
    "split": (["evaluate", "toyworld", "--split", "test"], "test"),
    "durations": (["evaluate", "toyworld", "--durations", "2,x"], "'x' is not a number"),
    "aspects": (["evaluate", "toyworld", "--truth", "--aspects", "1:1,wide"], "'wide'"),
    "both": (["evaluate", "toyworld", "--truth", "--vae"], "--vae"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_before_the_work(name, fake, capsys):
    pathlib.Path("file.txt").write_text("a file")
    pathlib.Path("empty.txt").write_text("# nothing\n")
    pathlib.Path("binary.txt").write_bytes(b"\x00\x80\xff\xfe")
    pathlib.Path("folder").mkdir()
    before = _files()
    arguments, words = BAD[name]
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.startswith("error: ") and err.endswith((".\n", "...]\n")), err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err and out == ""
    assert fake.requests == [] and _files() == before, "nothing sampled, nothing written"


def test_an_unknown_model_is_told(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a star", "--model", "nosuch"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "'nosuch'" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "No space is left"), (errno.EROFS, "read-only"), (errno.EACCES, "read-only")],
)
@pytest.mark.parametrize("moment", ["before", "while writing"])
def test_a_disk_that_refuses_leaves_the_good_file_alone(fake, capsys, monkeypatch, code, words, moment):
    pathlib.Path("out.mp4").write_bytes(b"good")

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    def now():
        monkeypatch.setattr("av.VideoFrame.from_ndarray", refuse)

    if moment == "before":
        monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    fake.before = now
    assert cli.main(["generate", "a star"]) == 2
    err = capsys.readouterr().err
    assert words in err and "out.mp4" in err and "Traceback" not in err
    assert bool(fake.requests) == (moment == "while writing")
    assert pathlib.Path("out.mp4").read_bytes() == b"good" and _files() == ["out.mp4"]


def test_figures_that_cannot_be_written_leave_the_old_ones(fake, capsys, monkeypatch):
    pathlib.Path("figures.json").write_text("{}")
    Video(np.zeros((1, 32, 32, 3), np.uint8), 1.0).save("x.png")

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("json.dumps", refuse)
    assert cli.main(["evaluate", "vae", "x.png", "--resolution", "32", "--json", "figures.json"]) == 2
    assert "No space is left on the disk that holds figures.json" in capsys.readouterr().err
    assert pathlib.Path("figures.json").read_text() == "{}" and _files() == ["figures.json", "x.png"]


def test_ctrl_c_stops_with_130(fake, capsys):
    # A shell's background job ignores SIGINT, and so would the test in it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    fake.before = lambda: signal.raise_signal(signal.SIGINT)
    assert threading.current_thread() is threading.main_thread()
    try:
        assert cli.main(["generate", "a star"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "stopped" and "Traceback" not in err and _files() == []


def test_a_fault_of_the_program_is_named_and_traced_only_when_asked(fake, capsys):
    def fail():
        raise ZeroDivisionError("all is lost\nand more")

    fake.before = fail
    assert cli.main(["generate", "a star", "-q"]) == 1
    err = capsys.readouterr().err
    assert (
        err
        == "error: the program failed (ZeroDivisionError: all is lost): run it with --traceback to see where.\n"
    )
    for arguments in (["--traceback", "generate", "a star"], ["generate", "a star", "--traceback"]):
        assert cli.main(arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err and "in fail" in err and err.splitlines()[-1].startswith("error: ")
    assert cli.main(["generate", " ", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_existing_file_is_not_overwritten_without_a_word(fake, capsys):
    assert cli.main(["generate", "a star", "-q"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["generate", "a star", "-q"]) == 0
    assert capsys.readouterr().err == "note: out.mp4 was there before and was overwritten.\n"
    before = pathlib.Path("out.mp4").read_bytes()
    fake.requests = []
    for name in ("out.mp4", "./out.mp4"):
        assert cli.main(["generate", "a ring", "--seed", "5", "-o", name, "--no-clobber"]) == 2
        assert "out.mp4 is there already: choose another name" in capsys.readouterr().err
    assert pathlib.Path("out.mp4").read_bytes() == before and fake.requests == []
    assert cli.main(["generate", "a ring", "-o", "new.mp4", "--no-clobber", "-q"]) == 0


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
    assert fake.loads == ["other"] and _files() == ["a-1.mp4", "a-2.mp4"]


def test_a_size_is_width_and_height(fake):
    assert cli.main(["generate", "a star", "--size", "48x32", "-q"]) == 0
    assert read_video("out.mp4").size == (32, 48)


@pytest.mark.parametrize("suffix", [".webm", ".jpg", ".gif", ".png"])
def test_every_kind_that_is_written_is_named_and_accepted(fake, suffix, capsys):
    assert cli.main(["generate", "a star", "-o", f"a{suffix}", "-q"]) == 0
    assert _files() == [f"a{suffix}"]
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
    program = "import sys; from sora_jax.cli import main; sys.exit(main())"
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
    assert len(makes) == 16
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
    monkeypatch.setattr(studio, "list_models", lambda folders: [])
    assert cli.main(["models"]) == 0
    assert capsys.readouterr().out == "There is no model here yet.\n"
    entry = studio.ModelEntry("runs/a", "run", pathlib.Path("runs/a"), summary="training run")
    monkeypatch.setattr(studio, "list_models", lambda folders: [entry])
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split("  ")[0] == "runs/a" and "training run" in out


def test_evaluate_vae_prints_a_table_and_writes_its_files(fake, capsys):
    rng = np.random.default_rng(0)
    Video(rng.integers(0, 255, (6, 48, 64, 3), np.uint8), 8.0).save("a.mp4")
    Video(np.full((1, 40, 40, 3), 100, np.uint8), 1.0).save("b.png")
    assert (
        cli.main(
            [
                "evaluate",
                "vae",
                "a.mp4",
                "b.png",
                "--resolution",
                "32",
                "--json",
                "j/x.json",
                "--sheet",
                "s.png",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["file", "size", "frames", "PSNR", "dB", "SSIM"]
    assert lines[1].split()[:3] == ["a.mp4", "42×32", "6"] and lines[2].split()[3] == "lossless"
    assert lines[3].startswith("mean") and lines[4:] == ["wrote j/x.json", "wrote s.png"]
    assert "7/7" in err
    result = json.loads(pathlib.Path("j/x.json").read_text())
    assert result["model"] == "fake" and len(result["files"]) == 2
    assert read_video("s.png").size[1] > 200


def test_evaluate_toyworld_prints_shares_and_writes_its_files(fake, capsys):
    arguments = [
        "evaluate",
        "toyworld",
        "--truth",
        "--clips",
        "2",
        "--durations",
        "1,2",
        "--split",
        "validation",
    ]
    assert cli.main([*arguments, "--json", "x.json", "--sheet", "s.png"]) == 0
    out, err = capsys.readouterr()
    rows = {line[:9].strip(): line[9:].split() for line in out.splitlines()[:8]}
    assert list(rows) == ["attribute", "colour", "shape", "direction", "size", "count", "inside", "all three"]
    assert rows["colour"][:2] == ["2/2", "100.0%"] and rows["count"][-1] == "-"
    assert "64×64, 8 frames" in out and "64×64, 16 frames" in out
    assert "2/2" in err and "clip/s" in err
    assert fake.loads == [], "true clips need no model"
    result = json.loads(pathlib.Path("x.json").read_text())
    assert result["settings"]["source"] == "truth" and len(result["clips"]) == 2
    assert cli.main(["evaluate", "toyworld", "--clips", "1", "--steps", "3", "--model", "m", "-q"]) == 0
    assert fake.loads == ["m"] and fake.requests[0].steps == 3


def test_a_real_model_from_its_folder_to_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vae = VAE(VAEConfig(channels=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8)), rngs=nnx.Rngs(0))
    dit = DiT(DiTConfig(size="", width=32, layers=1, heads=2, channels=4, text_width=16), rngs=nnx.Rngs(1))
    text = TextConfig(kind="hash", width=16, max_tokens=16)
    limits = Limits(tokens=16, text=16, row_text=32)
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
