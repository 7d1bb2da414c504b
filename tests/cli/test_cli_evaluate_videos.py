"""`sora-jax evaluate videos`: its table, its files, shards, local weights."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from helpers import formula
from helpers.drifting import drifting
from safetensors.numpy import save_file

from sora_jax.cli.main import main
from sora_jax.evaluation.networks import transformers
from sora_jax.media.video import Video, read_video

ORIGINALS = json.loads((pathlib.Path(__file__).parents[1] / "evaluation" / "originals.json").read_text())


@pytest.fixture
def videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("own", 0), ("real", 1)):
        for i, frames in enumerate(drifting(seed, 3, 4, 32)):
            pathlib.Path(folder).mkdir(exist_ok=True)
            Video(frames, 8.0, {"prompt": f"a b{' c' * i}"}).save(f"{folder}/{i}.mp4")


COMMAND = (
    "evaluate videos own --reference real --metrics fvd,ssim,temporal_flicker --frames 4 --few --features"
)
FVD = [*COMMAND.split(), "fvd=random-video", "--replicates", "20"]


def test_it_prints_a_table_and_writes_figures(videos, capsys):
    assert main([*FVD, "--json", "x.json"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["metric", "better", "value", "95%", "interval", "clips"]
    assert lines[1][:4] == ["Fréchet", "video", "distance", "(random-video)"] and lines[1][4] == "lower"
    assert lines[2][0] == "SSIM" and lines[2][-1] == "3" and lines[3][:2] == ["temporal", "flicker"]
    assert out.splitlines()[4] == "wrote x.json"
    assert "6/6" in err and "note: Fréchet video distance of 3 rows of 64 features is too high" in err
    result = json.loads(pathlib.Path("x.json").read_text())
    assert f"{result['metrics']['ssim']['value']:.4f}" == lines[2][2]
    assert (
        result["settings"]["metrics"] == ["fvd", "ssim", "temporal_flicker"]
        and result["made_by"]["commit"] != ""
    )
    assert not pathlib.Path("x.json.parts").exists(), "what was kept for an interruption is gone"


def test_shards_meet_in_one_command(videos, capsys):
    assert main([*FVD, "--json", "whole.json", "-q"]) == 0
    for shard in ("1/2", "2/2"):
        capsys.readouterr()
        assert main([*FVD, "--json", "x.json", "--shard", shard, "-q"]) == 0
        assert "measured 3 of 6 clips into x.json.parts: when all shards are done" in capsys.readouterr().out
        assert not pathlib.Path("x.json").exists()
    assert main([*FVD, "--json", "x.json", "-q"]) == 0
    assert "6 of 6 clips had been measured before" in capsys.readouterr().err
    whole, merged = (
        json.loads(pathlib.Path(name).read_text())["metrics"] for name in ("whole.json", "x.json")
    )
    for name in whole:
        assert merged[name]["value"] == pytest.approx(whole[name]["value"], rel=1e-6)


def test_statistics_are_kept_and_used(videos, capsys):
    own = ["--metrics", "fvd", "--features", "fvd=random-video", "--frames", "4", "--few", "-q"]
    assert main(["evaluate", "videos", "real", *own, "--save-statistics", "real.npz"]) == 0
    assert "wrote real.npz" in capsys.readouterr().out
    assert main(["evaluate", "videos", "own", *own, "--reference", "real.npz", "--replicates", "20"]) == 0
    assert "Fréchet video distance (random-video)" in capsys.readouterr().out
    assert main(["evaluate", "videos", "own", *own, "--reference", "real.npz", "--size", "16x16"]) == 2
    assert "pass --frames 4 --size 32x32 --fps 8 to bring them to that" in capsys.readouterr().err


def clip_folder(path: pathlib.Path) -> None:
    """A tiny CLIP with a vocabulary of single letters."""
    path.mkdir()
    save_file(
        formula.weights({name: tuple(shape) for name, shape in ORIGINALS["clip"]["shapes"].items()}),
        path / "model.safetensors",
    )
    (path / "config.json").write_text(json.dumps(ORIGINALS["clip"]["config"]))
    words = {letter: i for i, letter in enumerate("?abcdefgh")} | {"<s>": 48, "</s>": 49}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 48), ("</s>", 49)]
    )
    tokenizer.save(str(path / "tokenizer.json"))


def test_local_weights(videos, capsys):
    clip_folder(pathlib.Path("tiny-clip"))
    shapes = {name: tuple(shape) for name, shape in ORIGINALS["alex"]["shapes"].items()}
    save_file(formula.weights(shapes), "lpips.safetensors")
    arguments = (
        "evaluate videos own --reference real --metrics lpips,clip_score,background_consistency --frames 4 -q"
    )
    local = (
        "--weights lpips=lpips.safetensors --weights clip=tiny-clip --features background_consistency=clip"
    )
    assert main([*arguments.split(), *local.split(), "--json", "x.json"]) == 0
    result = json.loads(pathlib.Path("x.json").read_text())
    told = result["metrics"]
    assert told["lpips"]["value"] > 0 and told["lpips"]["label"] == "alex, weights of lpips.safetensors"
    assert told["background_consistency"]["label"] == "CLIP image features, weights tiny-clip"
    # The words of the videos' metadata, and their pictures, by the towers themselves.
    vision, text = transformers.clip_towers(ORIGINALS["clip"]["config"])
    tensors = formula.weights({name: tuple(shape) for name, shape in ORIGINALS["clip"]["shapes"].items()})
    weights = transformers.convert_clip(tensors, vision, text)
    wanted = []
    for i in range(3):
        frames = transformers.prepare_clip(read_video(f"own/{i}.mp4").frames.astype(np.float32), vision)
        ids = [48, 1, 2, *[3] * i, 49]
        words = transformers.clip_text(weights, np.array([ids + [0] * (12 - len(ids))]), text)[0]
        cosines = np.asarray(transformers.clip_image(weights, frames, vision)) @ np.asarray(words)
        wanted.append(np.maximum(100 * cosines, 0).mean())
        # Of drawn weights; the sign differs by the version of the decoder, and a score below 0 is 0.
        assert np.abs(cosines).max() > 1e-3
    assert [row["clip_score"] for row in result["clips"]] == pytest.approx(wanted, abs=1e-3)


BAD = {
    "a metric": (["--metrics", "fvt"], "There is no metric called 'fvt'"),
    "a shard": (["--shard", "3/2", "--json", "x.json"], "'3/2' is no shard"),
    "a shard without a place": (["--shard", "1/2"], "name it with --parts"),
    "a pair": (["--weights", "clip"], "'clip' is no name, = and a value"),
    "a folder": (["--reference", "absent"], "There is no file absent"),
    "too few": (
        ["--metrics", "fvd", "--features", "fvd=random-video", "--reference", "real"],
        "needs at least 65 clips",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_sentence(videos, case, capsys):
    arguments, sentence = BAD[case]
    features = (
        [] if "--features" in arguments or "absent" not in arguments else ["--features", "fvd=random-video"]
    )
    assert main(["evaluate", "videos", "own", "--frames", "4", "-q", *arguments, *features]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.startswith("error: ") and err.count("\n") == 1


def test_an_empty_folder_is_said(videos, capsys):
    pathlib.Path("empty").mkdir()
    assert main(["evaluate", "videos", "empty", "-q"]) == 2
    assert "empty holds no video or picture" in capsys.readouterr().err
