"""The command line where something is wrong: one sentence, an exit status, and no file harmed."""

import errno
import os
import pathlib
import signal
import threading

import pytest
from helpers.fake_pipeline import written_files

from sora_jax.cli import main as cli

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
        "--size sets the whole",
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
    before = written_files()
    arguments, words = BAD[name]
    status = cli.main(arguments)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert err.startswith("error: ") and err.endswith((".\n", "...]\n")), err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    assert words in err and out == ""
    assert fake.requests == [] and written_files() == before, "nothing sampled, nothing written"


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
    assert pathlib.Path("out.mp4").read_bytes() == b"good" and written_files() == ["out.mp4"]


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
    assert err.splitlines()[-1] == "stopped" and "Traceback" not in err and written_files() == []


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
