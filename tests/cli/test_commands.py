"""Every ability from the command line, on files that others wrote: what comes out, what is said, what is refused."""

from __future__ import annotations

import dataclasses
import fractions
import math
import pathlib
import shlex

import av
import numpy as np
import pytest
from helpers.film_files import MATRICES, click, pictures, with_matrix, write
from helpers.tiny_model import tiny_bundle
from PIL import Image

from sora_jax.checkpoints.bundle import save_bundle
from sora_jax.checkpoints.components import Limits
from sora_jax.cli import main as cli
from sora_jax.cli.edit import COMMANDS
from sora_jax.diffusion.guidance import METHODS
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.media import video
from sora_jax.media.video import read_video

LIMITS = Limits(tokens=36, latent_frames=4, frame_tokens=6, resolution=32, fps=24, text=12, text_len=24)
NTSC = fractions.Fraction(30000, 1001)
BOARD = """
duration: 1.5
resolution: 32
aspect: 3:2
cards:
  - {at: 0, text: a red circle, image: alpha.png}
  - {at: 0.5, text: a blue ring, clip: deep.mov, start: 0.25, end: 0.75}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A tiny model, and files as cameras, telephones and browsers write them."""
    place = tmp_path_factory.mktemp("commands")
    bundle = tiny_bundle(LIMITS)
    save_bundle(bundle, place / "tiny")
    save_bundle(dataclasses.replace(bundle, dit=None), place / "still")
    write(place / "sound.mp4", pictures(12, 32, 48), fps=12, sound=("aac", 48000, 0.3))
    write(place / "ntsc.webm", pictures(18, 64, 96), NTSC, "libvpx-vp9", sound=("libopus", 48000, 0.3))
    write(place / "portrait.mp4", pictures(8, 48, 32), fps=12)
    write(place / "odd.mp4", pictures(6, 47, 63), fps=8, pix_fmt="yuv444p")
    write(place / "deep.mov", pictures(8, 32, 48), fps=8, codec="prores_ks", pix_fmt="yuv422p10le")
    write(place / "uneven.mkv", pictures(6, 32, 48), fps=8, times_ms=[0, 100, 200, 300, 700, 800])
    with_matrix(write(place / "turned.mp4", pictures(8, 32, 48), fps=12), MATRICES["a quarter clockwise"])
    images = [Image.fromarray(frame) for frame in pictures(8, 32, 48)]
    images[0].save(place / "moves.gif", save_all=True, append_images=images[1:], duration=120)
    images[3].save(place / "one.gif")
    Image.fromarray(pictures(1, 96, 64)[0]).save(place / "photo.jpg")
    alpha = np.dstack([pictures(1, 32, 48)[0], np.full((32, 48), 255, np.uint8)])
    alpha[:, 24:, 3] = 0
    Image.fromarray(alpha).save(place / "alpha.png")
    mask = np.zeros((47, 63), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(place / "mask.png")
    Image.fromarray(mask * 0).save(place / "black.png")
    (place / "board.yaml").write_text(BOARD)
    (place / "words.yaml").write_text("duration: 2\ncards: [{text: a ring}, {at: 0.5, text: a star}]")
    return place


@pytest.fixture
def home(folder, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command is to give; `click` is the second of its sound's (NaN: it ends before), `notes` words of these."""

    line: str
    size: tuple[int, int]
    frames: int
    fps: float
    click: float | None = None
    notes: tuple[str, ...] = ()
    output: str = "result.mp4"


HELD = "nearest that the model 'tiny' holds"
RESULTS = [
    Result("image|a red circle|--resolution|32|--aspect|3:2", (32, 48), 1, 1, output="result.png"),
    Result("animate|photo.jpg|a red circle|--duration|1", (48, 32), 8, 8, notes=("64x96 to 32x48",)),
    Result("animate|alpha.png|--at|last|--aspect|1:1", (32, 32), 16, 8, notes=("transparent", "cropped")),
    Result("animate|one.gif|--at|0.5|--fps|12|--duration|1", (32, 48), 12, 12),
    Result("extend|sound.mp4|--seconds|0.5|--prompt|a ring", (32, 48), 18, 12, 0.3),
    Result("extend|sound.mp4|--seconds|0.55|--backward", (32, 48), 19, 12, 0.3 + 7 / 12),
    Result("extend|turned.mp4|--seconds|0.5|--end|0.5", (48, 32), 12, 12),
    Result("extend|one.gif|--seconds|1", (32, 48), 9, 8),
    Result(
        "extend|ntsc.webm|--seconds|0.5",
        (32, 48),
        14 + 12,
        24,
        0.3,
        ("96x64 to 48x32", "29.97 to 24 frames", f"48×32 at 24 fps is the {HELD}"),
    ),
    Result("recut|sound.mp4|--start|0.25|--end|0.75|--seconds|0.5", (32, 48), 12, 12, 0.05),
    Result(
        "loop|moves.gif|--seconds|0.5",
        (32, 48),
        8 + 3,
        25 / 3,
        notes=("takes 3 frames",),
        output="result.gif",
    ),
    Result(
        "loop|--prompt|a ring|--duration|1|--resolution|32|--seconds|0.5",
        (32, 32),
        4 + 3,
        8,
        notes=("nearest to 4 that is possible",),
    ),
    Result("fill|sound.mp4|--at|0.25-0.5,0.75", (32, 48), 12, 12, 0.3),
    Result("fill|uneven.mkv|--at|0.25-0.5", (32, 48), 8, 8, notes=("uneven times",)),
    Result("smooth|sound.mp4", (32, 48), 23, 24, 0.3),
    Result("smooth|odd.mp4|--fps|20", (32, 42), 11, 16, notes=(HELD, "16 frames a second, 2 times its 8")),
    Result(
        "connect|portrait.mp4|turned.mp4|--seconds|0.5", (48, 32), 23, 12, notes=("takes 7 frames (0.583 s)",)
    ),
    Result(
        "connect|sound.mp4|portrait.mp4|--seconds|0.5|--end-a|0.5|--start-b|0.25|--strength|0.5",
        (32, 48),
        6 + 7 + 5,
        12,
        notes=("portrait.mp4 was cropped", "takes 7 frames"),
    ),
    Result(
        "blend|deep.mov|moves.gif|--curve|0:0,0.5:0.5,0.9:1",
        (32, 48),
        8,
        8,
        notes=("8.333 to 8 frames",),
    ),
    Result("inpaint|sound.mp4|a ring|--box|16,0,16,16|--end|0.5", (32, 48), 6, 12, 0.3),
    Result("inpaint|odd.mp4|--mask|mask.png", (32, 42), 6, 8, notes=("63x47 to 42x32",)),
    Result("inpaint|alpha.png|--box|0,0,16,16", (32, 48), 1, 1, notes=("transparent",), output="result.png"),
    Result("outpaint|sound.mp4|--aspect|1:1", (32, 32), 12, 12, 0.3, ("48x32 to",)),
    Result("edit|sound.mp4|a ring|--motion|--start|0.25", (32, 48), 9, 12, 0.05),
    Result("edit|deep.mov|a ring|--strength|0", (32, 48), 8, 8),
    Result("storyboard|board.yaml", (32, 48), 12, 8, notes=("transparent",)),
    Result("upscale|sound.mp4|--resolution|64|--end|0.25|--strength|0.4", (64, 96), 3, 12, math.nan),
    # What is named of the result's shape.
    Result("animate|photo.jpg|--duration|0.5|--resolution|16", (24, 16), 4, 8, notes=("64x96 to",)),
    Result(
        "edit|deep.mov|a ring|--duration|0.5|--fps|4|--resolution|16|--aspect|1:1",
        (16, 16),
        2,
        4,
        notes=("48x32 to 24x16", "8 to 4 frames", "cropped to the shape of 16×16"),
    ),
    Result("extend|deep.mov|--duration|1.25|--size|24x16", (16, 24), 10, 8, notes=("48x32 to 24x16",)),
    Result(
        "inpaint|deep.mov|--box|16,0,16,32|--aspect|1:1|--duration|0.5",
        (32, 32),
        4,
        8,
        notes=("cropped",),
    ),
    Result("storyboard|words.yaml|--duration|1|--fps|4|--size|24x16", (16, 24), 4, 4),
    Result(
        "blend|deep.mov|moves.gif|--duration|0.5|--resolution|16", (16, 24), 4, 8, notes=("24x16", "8.333")
    ),
    Result("upscale|deep.mov|--size|64x64|--duration|0.25", (64, 64), 2, 8),
]


@pytest.mark.parametrize("wanted", RESULTS, ids=lambda wanted: wanted.line.replace("|", " "))
def test_an_ability_gives_what_was_asked_for_and_says_what_it_changed(wanted, home, tmp_path, capsys):
    path = tmp_path / wanted.output
    arguments = [*wanted.line.split("|"), "--model", "tiny", "--steps", "2", "-q", "-o", str(path)]
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    assert out.startswith(f"{path}  {wanted.size[1]}×{wanted.size[0]}") and out.count("\n") == 1
    video = read_video(path)
    assert (video.size, len(video)) == (wanted.size, wanted.frames)
    assert video.fps == pytest.approx(wanted.fps, rel=2e-3)
    assert video.frames.std() > 0
    if wanted.click is not None:
        assert click(path) == pytest.approx(wanted.click, abs=0.03, nan_ok=True)
        with av.open(str(path)) as container:
            sound = container.streams.audio[0]
            assert float(sound.duration * sound.time_base) < video.duration + 0.06
    assert ("with the input's sound" in out) == (wanted.click is not None)
    lines = err.splitlines()
    assert all(line.startswith("note: ") and line.endswith(".") for line in lines), err
    assert len(lines) == len(set(lines)) and bool(lines) == bool(wanted.notes), err
    for words in wanted.notes:
        assert words in err


def test_variations_are_one_sheet(home, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    small = ["--resolution", "32", "--duration", "0.5", "--steps", "2", "--model", "tiny", "-q"]
    assert cli.main(["variations", "a ring", "--count", "2", *small, "-o", str(path)]) == 0
    assert "2 seeds" in capsys.readouterr().out and read_video(path).size[1] > 64


def test_a_result_without_a_name_is_called_out(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(home / "tiny"), "--steps", "2", "-q"]
    assert cli.main(["image", "a ring", "--resolution", "32", *model]) == 0
    assert cli.main(["edit", str(home / "deep.mov"), "a ring", *model]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]
    assert capsys.readouterr().out.startswith("out.png  32×32\nout.mp4  48×32, 8 frames at 8 fps (1 s)\n")


def test_a_picture_without_a_name_overwrites_nothing_that_is_to_stay(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("out.png").write_bytes(b"good")
    arguments = ["inpaint", str(home / "alpha.png"), "--box", "0,0,16,16", "--model", str(home / "tiny")]
    assert cli.main([*arguments, "--steps", "2", "-q", "--no-clobber"]) == 2
    assert "out.png is there already" in capsys.readouterr().err
    assert pathlib.Path("out.png").read_bytes() == b"good"


def test_a_loop_as_gif_repeats_for_ever(home, tmp_path):
    path = tmp_path / "loop.gif"
    assert cli.main(["loop", "moves.gif", "--model", "tiny", "--steps", "2", "-q", "-o", str(path)]) == 0
    with Image.open(path) as image:
        assert image.info["loop"] == 0


def test_what_lies_outside_of_a_box_stays_to_the_pixel(home, tmp_path):
    path = tmp_path / "a.png"
    arguments = ["inpaint", "alpha.png", "--box", "0,0,16,16", "--model", "tiny", "--steps", "2", "-q"]
    assert cli.main([*arguments, "-o", str(path)]) == 0
    before, after = read_video("alpha.png").frames[0], read_video(path).frames[0]
    assert (before[16:] == after[16:]).all() and (before[:, 16:] == after[:, 16:]).all()
    assert (before[:16, :16] != after[:16, :16]).any()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_says_what_each_ability_and_option_is_for(command, capsys):
    assert cli.main([command.name, "--help"]) == 0
    out = capsys.readouterr().out
    assert command.help.splitlines()[0].split(";")[0] in " ".join(out.split())
    own = [option for option in command.params if option.param_type_name == "option"]
    assert all(option.help for option in own), [option.name for option in own if not option.help]


BAD = {
    "no such file": ("extend nowhere.mp4 --seconds 1", "'nowhere.mp4' does not exist"),
    "a folder": ("smooth tiny", "'tiny' is a directory"),
    "a text": ("edit board.yaml 'a ring'", "board.yaml can't be read as a video"),
    "noise": ("loop noise.mp4", "noise.mp4 can't be read as a video"),
    "an empty file": ("loop empty.mp4", "empty.mp4 is empty"),
    "no frames": ("extend frameless.avi --seconds 1", "frameless.avi"),
    "sound alone": ("extend only.m4a --seconds 1", "only sound"),
    "half a file": ("outpaint half.mp4 --aspect 2:1", "half.mp4 can't be read"),
    "half a picture": ("animate half.png 'a ring'", "half.png can't be read as a picture"),
    "too long": ("extend long.mp4 --seconds 1", "2880 frames to read at 24 a second, but 2000"),
    "too long a second video": ("connect ntsc.webm long.mp4", "read a part with --start and --end"),
    "a part beyond the end": ("extend sound.mp4 --seconds 1 --start 5", "no frame at 5 seconds"),
    "an end before the start": (
        "smooth sound.mp4 --start 1 --end 0.5",
        "end, 0.5 s, is not after the start, 1 s",
    ),
    "an end before the start of B": (
        "blend deep.mov deep.mov --start-b 1 --end-b 1",
        "is not after the start",
    ),
    "a negative start": ("smooth sound.mp4 --start -1", "-1 is not a number of at least 0"),
    "no time added": ("extend sound.mp4 --seconds 0", "0 is not a number above 0"),
    "a cut without its end": ("recut sound.mp4 --start 0 --seconds 1", "Missing option '--end'"),
    "a place beyond the end": ("animate one.gif --at 2", "frame 16 of a video of 16 frames"),
    "a place in words": ("animate one.gif --at middle", "'middle' is not a number"),
    "nothing missing": ("fill sound.mp4 --at 3-4", "lasts from 0 to 1 s"),
    "everything missing": ("fill sound.mp4 --at 0-9", "every frame is missing"),
    "a gap backward": ("fill sound.mp4 --at 0.5-0.25", "from 0.5 to 0.25 s"),
    "a gap without numbers": ("fill sound.mp4 --at all", "'all' is not a number"),
    "an endless gap": ("fill sound.mp4 --at 0.5-inf", "inf is not a number"),
    "a slower rate": ("smooth sound.mp4 --fps 6", "12 frames a second already"),
    "a picture smoothed": ("smooth photo.jpg", "nothing between"),
    "a curve that falls back": ("blend deep.mov deep.mov --curve 0:0,0.5:1,0.2:1", "times must rise"),
    "a weight above 1": ("blend deep.mov deep.mov --curve 0:0,1:2", "from 0 to 1"),
    "a curve without weights": ("blend deep.mov deep.mov --curve 0,1", "two numbers with ':' between"),
    "a strength above 1": ("edit deep.mov 'a ring' --strength 1.5", "1.5 is not in the range"),
    "a strength below 0": ("connect deep.mov deep.mov --strength -0.1", "-0.1 is not in the range"),
    "a box outside": ("inpaint deep.mov --box 40,0,16,16", "not inside the picture of 48×32"),
    "an empty box": ("inpaint deep.mov --box 4,0,0,16", "not inside the picture"),
    "a box of three": ("inpaint deep.mov --box 0,0,16", "four numbers"),
    "a box in words": ("inpaint deep.mov --box left", "'left' is not a valid integer"),
    "neither box nor mask": ("inpaint deep.mov 'a ring'", "give one of the two"),
    "a box and a mask": ("inpaint deep.mov --box 0,0,9,9 --mask mask.png", "give one of the two"),
    "a black mask": ("inpaint odd.mp4 --mask black.png", "black everywhere"),
    "an empty mask": ("inpaint odd.mp4 --mask empty.mp4", "empty.mp4 is empty"),
    "a duration that is there": ("extend deep.mov --duration 0.5", "lasts 1 s already"),
    "a duration said twice": ("extend deep.mov --duration 2 --seconds 1", "given twice"),
    "a size said twice": ("edit deep.mov 'a ring' --size 9x9 --aspect 1:1", "--size sets the whole"),
    "a loop shorter than its way back": (
        "loop --prompt 'a ring' --duration 1 --seconds 1.5",
        "ask for a longer duration",
    ),
    "a storyboard shorter than its cards": (
        "storyboard board.yaml --duration 0.25",
        "Card 2 of the storyboard",
    ),
    "a box that is cropped": ("inpaint deep.mov --box 0,0,4,4 --aspect 1:2", "crops"),
    "a frame that fits nowhere": ("upscale deep.mov --resolution 100000", "GiB of memory"),
    "a word that the model doesn't know": (
        "edit deep.mov 'a white cat' --model toyworld --strict",
        "knows nothing of 'white' and 'cat'",
    ),
    "a mistyped ability": ("exten deep.mov --seconds 1", "extend"),
    "a mistyped option": ("edit deep.mov 'a ring' --strengh 0.5", "--strength"),
    "the aspect ratio that is there": ("outpaint deep.mov --aspect 3:2", "already"),
    "an aspect ratio in words": ("outpaint deep.mov --aspect wide", "'wide'"),
    "a resolution that is there": ("upscale deep.mov --resolution 32", "32 pixels already"),
    "an empty prompt": ("image ' '", "prompt is empty"),
    "an edit to nothing": ("edit deep.mov ''", "prompt is empty"),
    "nothing to vary": ("variations ''", "prompt is empty"),
    "nothing to loop": ("loop", "name a video, or give a --prompt"),
    "a long prompt": ("edit deep.mov 'a b c d e f g h i j k l m n o'", "tokens and the model"),
    "a long negative prompt": (
        "edit deep.mov 'a ring' --negative 'a b c d e f g h i j k l m n o'",
        "shorten",
    ),
    "another suffix": ("edit deep.mov 'a ring' -o out.avi", "must end in .mp4"),
    "a sheet that is no picture": ("variations 'a ring' -o out.mp4", "must end in .png"),
    "no such model": ("edit deep.mov 'a ring' --model nosuch", "no model 'nosuch'"),
    "a model that can't generate": ("image 'a ring' --model still", "autoencoder only"),
    "a model that can't repaint": ("edit deep.mov 'a ring' --model still", "autoencoder only"),
    "a model that can't upscale": ("upscale deep.mov --resolution 64 --model still", "autoencoder only"),
    "a storyboard that isn't there": ("storyboard nowhere.yaml", "does not exist"),
    "a storyboard that is no text": ("storyboard photo.jpg", "photo.jpg is not UTF-8 text"),
    "a storyboard without its picture": ("storyboard pictureless.yaml", "no file absent.png"),
}


@pytest.fixture(scope="module")
def damaged(folder) -> pathlib.Path:
    """Files that can't be used, next to those that can."""
    whole = (folder / "sound.mp4").read_bytes()
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    Image.effect_noise((64, 64), 90).save(folder / "half.png")
    (folder / "half.png").write_bytes((folder / "half.png").read_bytes()[:2000])
    write(folder / "long.mp4", pictures(3000, 16, 16))
    with av.open(str(folder / "frameless.avi"), "w") as container:
        stream = container.add_stream("ffv1", 25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with av.open(str(folder / "only.m4a"), "w", format="mp4") as container:
        stream = container.add_stream("aac", 48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame) + stream.encode(None))
    (folder / "pictureless.yaml").write_text("cards: [{at: 0, text: a ring, image: absent.png}]")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_leaves_no_file(name, damaged, home, capsys):
    before = sorted(home.iterdir())
    line, words = BAD[name]
    arguments = shlex.split(line)
    model = [] if "--model" in arguments else ["--model", "tiny"]
    assert cli.main([*arguments, *model, "--steps", "2"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.endswith((".\n", "?\n", "...]\n")) and err.count("\n") == 1, err
    assert words in err and out == "", err
    assert sorted(home.iterdir()) == before


def test_a_video_that_is_broken_in_the_middle_is_used_and_that_is_said(home, tmp_path, capsys):
    noise = list(np.random.default_rng(0).integers(0, 256, (24, 32, 48, 3)).astype(np.uint8))
    data = bytearray(write(tmp_path / "a.mp4", noise, fps=12).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    arguments = [
        "extend",
        str(tmp_path / "a.mp4"),
        "--seconds",
        "0.5",
        "--model",
        "tiny",
        "--steps",
        "2",
        "-q",
    ]
    assert cli.main([*arguments, "-o", str(tmp_path / "b.mp4")]) == 0
    assert "is damaged: " in capsys.readouterr().err and len(read_video(tmp_path / "b.mp4")) == 30


def test_a_long_video_is_refused_before_it_is_decoded(damaged, home, monkeypatch, capsys):
    taken = 0

    def counted(*arguments):
        nonlocal taken
        for moment in decoded(*arguments):
            taken += 1
            yield moment

    decoded = video.decoded
    monkeypatch.setattr(video, "decoded", counted)
    assert cli.main(["extend", "long.mp4", "--seconds", "1", "--model", "tiny"]) == 2
    assert "--start and --end" in capsys.readouterr().err and taken <= 6


def test_the_options_of_the_sampler_are_those_that_it_has(home):
    # They are written out in cli/options.py, so that --help needs no JAX.
    choices = {option.name: option.type for option in cli.cli.commands["edit"].params}
    assert tuple(choices["solver"].choices) == SOLVERS
    assert tuple(choices["guidance_method"].choices) == METHODS
