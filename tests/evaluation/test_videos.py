"""A folder of videos measured: figures, shards, interruptions, kept statistics, and what is refused."""

import json
import pathlib

import numpy as np
import pytest
from helpers.drifting import drifting

from sora_jax.errors import UserError
from sora_jax.evaluation import metrics, stream, temporal
from sora_jax.evaluation.catalogue import METRICS
from sora_jax.evaluation.clips import ClipSettings, list_clips, read_clip
from sora_jax.evaluation.extractors import load_extractor
from sora_jax.evaluation.frechet import Moments, frechet_distance
from sora_jax.evaluation.videos import evaluate_videos
from sora_jax.media.video import Video, read_video

FOUR = ClipSettings(frames=4)
QUICK = {"fvd": "random-video", "fid": "random-image", "subject_consistency": "random-image"}
PLAIN = ("psnr", "ssim", "temporal_flicker", "subject_consistency")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """`own` and `real`, five clips each of the same names; their arrays are those that are read back."""
    root = tmp_path_factory.mktemp("videos")
    for name, seed in (("own", 0), ("real", 1)):
        for i, frames in enumerate(drifting(seed, 5, 6, 32)):
            path = root / name / f"{'deep/' if i == 4 else ''}{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            Video(frames, 8.0, {"prompt": f"clip {i}"}).save(path)
    return root


def frames_of(folder: pathlib.Path) -> np.ndarray:
    return np.stack([read_video(path, frames=4).frames for path in sorted(folder.rglob("*.mp4"))])


def evaluate(folders: pathlib.Path, *names: str, **options) -> dict:
    asked = {name: QUICK[name] for name in names if name in QUICK}
    options = {"clip": FOUR, "few": True, "replicates": 20, "features": asked} | options
    return evaluate_videos(folders / "own", names, folders / "real", **options)


def test_figures_are_those_of_the_clips(folders):
    result = evaluate(folders, "fvd", "fid", *PLAIN)
    own, real = frames_of(folders / "own"), frames_of(folders / "real")
    assert [row["file"] for row in result["clips"]] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "deep/4.mp4"]
    np.testing.assert_allclose([row["psnr"] for row in result["clips"]], metrics.psnr(own, real))
    np.testing.assert_allclose([row["ssim"] for row in result["clips"]], metrics.ssim(own, real))
    told = result["metrics"]
    assert told["psnr"]["value"] == pytest.approx(float(np.mean(metrics.psnr(own, real))))
    assert told["psnr"]["low"] < told["psnr"]["value"] < told["psnr"]["high"] and told["psnr"]["clips"] == 5
    assert told["temporal_flicker"]["value"] == pytest.approx(
        np.mean([temporal.temporal_flicker(c) for c in own])
    )
    extract = load_extractor("random-video")
    wanted = frechet_distance(*(Moments.of(extract(each)[:, 0]) for each in (own, real)))
    assert told["fvd"]["value"] == pytest.approx(wanted, rel=1e-6)
    assert told["fvd"]["features"] == "random-video" and "untrained" in told["fvd"]["label"]
    pictures = load_extractor("random-image")
    rows = [pictures(each).reshape(-1, pictures.width) for each in (own, real)]
    assert told["fid"]["value"] == pytest.approx(frechet_distance(*map(Moments.of, rows)), rel=1e-6)
    assert told["fid"]["rows"] == 20
    notes = " ".join(result["notes"])
    for part in (
        "covariance is singular",
        "published figures are of 2,048",
        "of 4 frames of each clip",
        "VBench takes DINO",
    ):
        assert part in notes
    json.dumps(result, allow_nan=False)


def test_shards_give_what_the_whole_gives(folders, tmp_path):
    whole = evaluate(folders, "fvd", *PLAIN)
    for shard in (3, 1, 4, 2):
        part = evaluate(folders, "fvd", *PLAIN, shard=(shard, 4), parts=tmp_path / "parts")
        assert part["measured"] in (2, 3) and part["of"] == 10 and "metrics" not in part
    again = evaluate(folders, "fvd", *PLAIN, parts=tmp_path / "parts")
    assert any(
        "5 of 10" in note or "10 of 10 clips had been measured before" in note for note in again["notes"]
    )
    for name, told in whole["metrics"].items():
        assert again["metrics"][name]["value"] == pytest.approx(told["value"], rel=1e-6)
        assert again["metrics"][name]["low"] == pytest.approx(told["low"], rel=1e-6)


def test_an_interrupted_evaluation_goes_on(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_BATCH", 2)
    monkeypatch.setattr(stream, "_PART", 2)
    read = stream.read_clip

    def stop(clip, settings):
        if clip.name == "deep/4.mp4":
            raise KeyboardInterrupt
        return read(clip, settings)

    monkeypatch.setattr(stream, "read_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, "ssim", "temporal_flicker", parts=tmp_path / "p")
    kept = sorted((tmp_path / "p").glob("*.npz"))
    assert len(kept) == 2
    (tmp_path / "p" / "torn.npz").write_bytes(kept[0].read_bytes()[:-30])  # as a full disk would leave it
    again, seen = [], []
    monkeypatch.setattr(
        stream, "read_clip", lambda clip, settings: again.append(clip.name) or read(clip, settings)
    )
    result = evaluate(
        folders,
        "ssim",
        "temporal_flicker",
        parts=tmp_path / "p",
        progress=lambda done, of: seen.append((done, of)),
    )
    assert again == ["deep/4.mp4"] * 2 and seen == [(4, 5), (5, 5)]
    assert result["metrics"] == evaluate(folders, "ssim", "temporal_flicker")["metrics"]


def test_parts_of_other_settings_are_refused(folders, tmp_path):
    evaluate(folders, "ssim", parts=tmp_path / "p")
    with pytest.raises(
        UserError, match=r"other settings \(frames was 4, now 5\): name another folder with --parts"
    ):
        evaluate(folders, "ssim", parts=tmp_path / "p", clip=ClipSettings(5))
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is no folder of parts"):
        evaluate(folders, "ssim", parts=tmp_path / "q")


def test_kept_statistics_stand_for_their_folder(folders, tmp_path):
    path = tmp_path / "real.npz"
    names = ("fvd", "fid")
    options = {"features": {name: QUICK[name] for name in names}, "few": True, "clip": FOUR}
    alone = evaluate_videos(folders / "real", names, statistics=path, **options)
    assert alone["metrics"] == {} and alone["reference"] is None
    told = evaluate_videos(folders / "own", names, path, replicates=20, **options)
    direct = evaluate(folders, *names)
    for name in names:
        assert told["metrics"][name]["value"] == pytest.approx(direct["metrics"][name]["value"], rel=1e-9)
    reference = told["reference"]
    assert reference["clips"] == 5 and reference["clip"] == {
        "frames": 4,
        "height": 32,
        "width": 32,
        "fps": 8.0,
    }
    assert reference["source"]["folder"] == "real" and len(reference["source"]["digest"]) == 16
    assert reference["made_by"]["sora_jax"]

    with pytest.raises(
        UserError, match=r"is of clips of 4 frames, 32×32 at 8 fps, and these are of 5 frames"
    ):
        evaluate_videos(folders / "own", names, path, **options | {"clip": ClipSettings(5)})
    with pytest.raises(UserError, match="compare each clip with the one of the same name"):
        evaluate_videos(folders / "own", ("psnr",), path, clip=FOUR)
    evaluate_videos(
        folders / "real",
        ("fvd",),
        statistics=tmp_path / "half.npz",
        **options | {"features": {"fvd": QUICK["fvd"]}},
    )
    with pytest.raises(
        UserError, match=r"half.npz has statistics for fvd alone: make it again with --metrics fid too"
    ):
        evaluate_videos(folders / "own", names, tmp_path / "half.npz", **options)


def test_statistics_of_another_extractor_are_refused(folders, tmp_path, monkeypatch):
    path = tmp_path / "real.npz"
    options = {"features": {"fvd": "random-video"}, "few": True, "clip": FOUR}
    evaluate_videos(folders / "real", ("fvd",), statistics=path, **options)
    monkeypatch.setattr("sora_jax.evaluation.extractors.PROTOCOL", 2)
    with pytest.raises(
        UserError, match=r"real.npz was made with random-video, version \w{16}, and the clips are measured"
    ):
        evaluate_videos(folders / "own", ("fvd",), path, **options)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"real.npz can't be read as statistics"):
        evaluate_videos(folders / "own", ("fvd",), path, **options)


def test_too_few_clips_are_refused_with_how_many_are_needed(folders):
    with pytest.raises(
        UserError, match=r"Fréchet video distance of 64 features needs at least 65 clips .* there are 5"
    ):
        evaluate(folders, "fvd", few=False)
    with pytest.raises(UserError, match=r"Fréchet image distance of 64 features needs at least 17 clips"):
        evaluate(folders, "fid", few=False)


def test_other_shapes_and_rates_are_said_and_resampled_when_asked(folders, tmp_path):
    for i, frames in enumerate(drifting(2, 5, 6, 48)):
        Video(frames[:, :, :40], 8.0 if i else 12.0).save(
            tmp_path / "real" / f"{'deep/' if i == 4 else ''}{i}.mp4"
        )
    options = {"clip": FOUR, "features": {"fvd": "random-video"}, "few": True, "replicates": 20}
    with pytest.raises(UserError) as refused:
        evaluate_videos(folders / "own", ("fvd", "psnr"), tmp_path / "real", **options)
    for part in (
        "fvd, psnr compare",
        "these are 32×32 at 8 fps",
        "4 of 40×48 at 8 fps",
        "1 of 40×48 at 12 fps",
    ):
        assert part in str(refused.value)
    assert "pass --size" in str(refused.value) and "--fps 8" in str(refused.value)
    asked = options | {"clip": ClipSettings(4, fps=8.0, size=(32, 32))}
    result = evaluate_videos(folders / "own", ("fvd", "psnr"), tmp_path / "real", **asked)
    assert result["metrics"]["psnr"]["clips"] == 5
    # What compares nothing takes any, and says so.
    alone = evaluate_videos(tmp_path / "real", ("temporal_flicker",), clip=FOUR)
    assert any("differ in size or rate (4 of 40×48 at 8 fps, 1 of" in note for note in alone["notes"])


def test_clips_without_a_partner_are_named(folders, tmp_path):
    Video(drifting(0, 1, 6, 32)[0], 8.0).save(tmp_path / "real" / "0.mp4")
    with pytest.raises(
        UserError, match=r"4 of 5 clips have none of their name in .*: 1.mp4, 2.mp4, 3.mp4, deep/4.mp4"
    ):
        evaluate_videos(folders / "own", ("psnr",), tmp_path / "real", clip=FOUR)


def test_short_files_are_named_with_their_frames(folders):
    with pytest.raises(
        UserError, match=r"5 files in .* fewer than the 16 frames of a clip: 0.mp4 \(6\), 1.mp4 \(6\)"
    ):
        evaluate_videos(folders / "own", ("temporal_flicker",))


def test_arrays_are_clips_and_numbers_that_are_none_are_named(tmp_path):
    frames = drifting(0, 2, 4, 24)
    np.save(tmp_path / "a.npy", frames[0])
    np.save(tmp_path / "b.npy", frames[1] / 255.0)
    result = evaluate_videos(tmp_path, ("temporal_flicker",), clip=FOUR)
    wanted = [temporal.temporal_flicker(each) for each in frames]
    assert [row["temporal_flicker"] for row in result["clips"]] == pytest.approx(wanted)
    with pytest.raises(UserError, match="needs the clips' rate, which arrays don't tell: pass --fps"):
        evaluate_videos(tmp_path, ("motion_magnitude",), clip=FOUR)
    broken = frames[1] / 255.0
    broken[1:3, 0, 0] = np.nan
    np.save(tmp_path / "c.npy", broken)
    with pytest.raises(UserError, match=r"c.npy has values .* in 2 of its frames, first in frame 1"):
        evaluate_videos(tmp_path, ("temporal_flicker",), clip=FOUR)


def test_clips_of_a_file_are_spread_evenly(tmp_path):
    frames = np.repeat(np.arange(0, 200, 20, dtype=np.uint8), 32 * 32 * 3).reshape(10, 32, 32, 3)
    np.save(tmp_path / "x.npy", frames)
    settings = ClipSettings(4, fps=5.0, per_video=3)
    clips = list_clips(tmp_path, settings)
    assert [read_clip(clip, settings)[0][0, 0, 0, 0] // 20 for clip in clips] == [0, 3, 6]


def test_a_folder_is_no_way_from_itself(folders):
    options = {"features": {"fvd": "random-video"}, "few": True, "replicates": 20, "clip": FOUR}
    told = evaluate_videos(folders / "own", ("fvd", "temporal_flicker"), folders / "own", **options)[
        "metrics"
    ]
    assert told["fvd"]["value"] < 1e-3 and told["temporal_flicker"]["clips"] == 5
    options["replicates"] = 0
    told = evaluate_videos(folders / "own", ("fvd", "temporal_flicker"), folders / "own", **options)[
        "metrics"
    ]
    assert all(each["low"] is each["high"] is each["interval"] is None for each in told.values())


def test_a_loss_of_nothing_is_no_number(folders):
    result = evaluate_videos(folders / "own", ("psnr", "ssim"), folders / "own", clip=FOUR)
    assert result["metrics"]["psnr"]["value"] is None and result["metrics"]["psnr"]["lossless"] == 5
    assert result["clips"][0]["psnr"] is None and result["metrics"]["ssim"]["value"] == 1


REFUSED = {
    "an unknown metric": ({"metrics": ("fvt",)}, "There is no metric called 'fvt': did you mean fvd"),
    "no reference": ({"metrics": ("fvd",), "reference": None}, "name the other folder"),
    "a reference without use": ({"metrics": ("temporal_flicker",)}, "leave --reference out"),
    "no weights": ({"metrics": ("lpips",)}, r"LPIPS needs LPIPS's weights: pass --weights lpips=PATH"),
    "no captions' model": ({"metrics": ("clip_score",), "reference": None}, "pass --weights clip=PATH"),
    "unknown features": ({"metrics": ("fvd",), "features": {"fvd": "i3dd"}}, "did you mean i3d"),
    "features of pictures": (
        {"metrics": ("fvd",), "features": {"fvd": "random-image"}},
        "takes features of videos",
    ),
    "features without use": (
        {"metrics": ("ssim",), "features": {"fid": "clip"}},
        "--features fid=clip has no use",
    ),
    "features without weights": (
        {"metrics": ("fid",), "features": {"fid": "inception"}},
        "--weights inception=PATH",
    ),
    "no such weights": (
        {"metrics": ("fid",), "features": {"fid": "inception"}, "weights": {"inception": "absent.pth"}},
        "There is no file of weights absent.pth",
    ),
    "a shard without a place": ({"metrics": ("ssim",), "shard": (1, 2)}, "name it with --parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_done_is_refused(folders, case):
    options, sentence = REFUSED[case]
    options = {"reference": folders / "real", "clip": FOUR} | options
    with pytest.raises(UserError, match=sentence):
        evaluate_videos(folders / "own", **options)


def test_every_metric_is_in_the_documents_table():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in METRICS if f"| `{name}` |" not in page] == []
