"""Videos of any length: made while they are read, the same to the bit as made whole, and nothing whole is held."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from helpers.tiny_model import tiny_bundle

from sora_jax.checkpoints.components import Limits
from sora_jax.cli import main as cli
from sora_jax.diffusion.solvers import solver_step
from sora_jax.errors import UserError
from sora_jax.media.video import Video, VideoStream, read_video
from sora_jax.models import tiles
from sora_jax.pipeline import denoise, sketches, temporal_abilities
from sora_jax.pipeline import pipeline as module
from sora_jax.pipeline.job import Job
from sora_jax.pipeline.pipeline import Pipeline, Request
from sora_jax.pipeline.request import text_to_video
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.storyboard import Card, Storyboard, storyboard
from sora_jax.pipeline.windows import MAX_ANCHOR_GAP, Context, WindowedCanvas
from sora_jax.tokens.canvas import temporal_windows
from sora_jax.tokens.patches import unpatchify

SETTINGS = Settings(steps=2, guidance=1.0)
FIELDS = {"resolution": 32, "steps": 2, "guidance": 1.0}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Sees three latent frames of four tokens at once."""
    return Pipeline(tiny_bundle(Limits(tokens=12, text=12, text_len=24)))


# First, since it drops what was compiled.
def test_a_long_video_compiles_one_step_and_two_programs_of_the_decoder(pipeline):
    solver_step.clear_cache()
    tiles._decode_chunk.clear_cache()
    stream = pipeline.stream("a ring", duration=9.0, **FIELDS)
    assert sum(1 for _ in stream) == 72
    assert solver_step._cache_size() == 1
    assert tiles._decode_chunk._cache_size() == 2, "the first latent frame, and chunks behind it"


def test_streams_read_in_turn_equal_videos_made_whole(pipeline):
    later = ({}, {"context_noise": 0.25}, {"context_noise": 0.25, "anchor": True})
    requests = [Request("a ring", duration=3.0 + i, seed=i, **FIELDS, **own) for i, own in enumerate(later)]
    streams = pipeline.stream_batch(requests)
    mixed = zip(*itertools.zip_longest(*streams), strict=True)
    jobs = [text_to_video(pipeline, request) for request in requests]
    canvases = denoise.denoise(pipeline, jobs, [pipeline.prepare_latents(job.sketch) for job in jobs])
    for request, stream, frames, canvas in zip(requests, streams, mixed, canvases, strict=True):
        whole = pipeline.decode_latents(canvas, *request.shape())
        assert len(whole) == len(stream) == round(8 * request.duration) and whole.std() > 1
        np.testing.assert_array_equal(np.stack([frame for frame in frames if frame is not None]), whole)
        assert stream.size == (32, 32) and stream.duration == request.duration


@pytest.mark.slow
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_a_seed_has_one_noise_however_a_canvas_is_cut(monkeypatch, patch):
    """Each latent frame's is that of the canvas drawn at once, forward and backward."""
    engine = Pipeline(tiny_bundle(Limits(tokens=16, text=12, text_len=24), patch=patch))
    drawn: dict[int, np.ndarray] = {}
    real = WindowedCanvas.next_window

    def watched(windowed):
        (seen, _), (part, noise) = windowed.windows[0], real(windowed)
        drawn.update(zip(range(seen.start, seen.stop), noise, strict=True))
        return part, noise

    monkeypatch.setattr(WindowedCanvas, "next_window", watched)
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    made = [sketches.all_noise((60, 32, 32), 8.0)]
    if patch[0] == 1:
        made.append(sketches.extend(clip, 60, 8.0, backward=True))
    for sketch in made:
        drawn.clear()
        canvas = engine.prepare_latents(sketch)
        denoise.denoise(engine, [Job(sketch, (), dataclasses.replace(SETTINGS, seed=7))], [canvas])
        (t, y, x, c), count = canvas.latent.shape, np.prod(patch)
        whole = np.random.default_rng(7).standard_normal((t * y * x // count, count * c)).astype(np.float32)
        whole = unpatchify(whole, (t, y, x), patch)
        assert len(drawn) == t
        for number, noise in drawn.items():
            np.testing.assert_array_equal(noise, whole[number])


def test_an_all_noise_canvas_is_the_encoded_all_noise_sketch(pipeline):
    ours = pipeline.prepare_latents(sketches.all_noise((30, 20, 40), 8.0))
    theirs = pipeline.prepare_latents(sketches.all_noise((30, 20, 40), 8.0, writable=True))
    for field in dataclasses.fields(ours):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    assert ours.latent.strides == (0, 0, 0, 0) and not ours.conditioning_frames.any()


def test_of_ten_thousand_seconds_the_first_frames_come_at_once(pipeline):
    reports: list[tuple[int, int]] = []
    short = pipeline.generate("a ring", duration=3.0, **FIELDS)
    tracemalloc.start()
    stream = pipeline.stream(
        "a ring", lambda *at: reports.append(at), duration=10_000.0, max_frames=80_000, **FIELDS
    )
    frames = np.stack(list(itertools.islice(stream, 20)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(frames, short.frames[:20])
    assert len(stream) == 80_000
    steps = 2 * len(
        temporal_windows(pipeline.prepare_latents(sketches.all_noise((80_000, 32, 32), 8.0)), 3, 1)
    )
    assert reports[0] == (0, steps) and reports[-1][0] < 20
    assert peak < 20e6, "its frames take 246 MB"


def test_what_is_held_while_a_video_is_made_does_not_grow_with_it(pipeline, monkeypatch):
    made: list[WindowedCanvas] = []
    real = WindowedCanvas.__init__
    monkeypatch.setattr(
        WindowedCanvas, "__init__", lambda self, *given: real(self, *given) or made.append(self)
    )
    most = {}
    for seconds in (8.0, 24.0):
        held = [made[-1].held for _ in pipeline.stream("a ring", duration=seconds, **FIELDS)]
        most[seconds] = max(held)
        assert held[-1] == 0
    # Of a window's three latent frames: generated and noise; those that are read.
    assert most[8.0] == most[24.0] <= 8


def test_latents_are_ready_as_soon_as_no_later_window_changes_them(pipeline):
    clip = np.zeros((5, 32, 32, 3), np.uint8)  # two latent frames
    for sketch, ready in (
        (sketches.all_noise((33, 32, 32), 8.0), [3, 5, 7, 9]),
        (sketches.extend(clip, 16, 8.0), [4, 6]),
        (sketches.extend(clip, 16, 8.0, backward=True), [0, 0, 7]),
    ):
        canvas = pipeline.prepare_latents(sketch)
        windowed = WindowedCanvas(canvas, 3, Context(1), (1, 2, 2), 0)
        for number in ready:
            _, noise = windowed.next_window()
            windowed.put(noise)
            assert len(windowed.ready) == number
        assert not windowed.windows and len(canvas) == ready[-1]
        given = canvas.init_sigma == 0
        np.testing.assert_array_equal(np.stack(windowed.ready)[given], canvas.latent[given])


def test_noise_on_the_context_and_an_anchor_are_for_generated_frames_of_later_windows(pipeline):
    """Conditioning stays as it was given, and what is generated once stays."""
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)  # two latent frames
    for sketch, windows in (
        # Of each window sigmas, and the latent frame that is its anchor.
        (sketches.all_noise((21, 32, 32), 8.0), [("111", None), ("021", 0), ("021", 0), ("021", 0)]),
        (sketches.extend(clip, 12, 8.0), [("001", 0), ("021", 1), ("021", 1)]),
        (sketches.extend(clip, 12, 8.0, backward=True), [("110", None), ("112", None)]),
    ):
        canvas = pipeline.prepare_latents(sketch)
        windowed = WindowedCanvas(canvas, 3, Context(1, noise=0.25, anchor=True), (1, 2, 2), 0)
        finished: dict[int, np.ndarray] = {}
        for sigmas, anchor in windows:
            (window, new), fresh = windowed.windows[0], windowed.fresh
            part, noise = windowed.next_window()
            assert windowed.anchors[0] == anchor
            numbers = [*([] if anchor is None else [anchor]), *range(window.start, window.stop)]
            assert numbers[fresh] == list(range(new.start, new.stop)) and len(part) == len(noise) == 3
            wanted = [{"0": 0.0, "1": 1.0, "2": 0.25}[sigma] for sigma in sigmas]
            np.testing.assert_array_equal(part.init_sigma.max((1, 2)), wanted)
            for place, number in enumerate(numbers):
                if number in finished:
                    np.testing.assert_array_equal(part.latent[place], finished[number])
            # All of it comes back changed, the context too.
            windowed.put(noise + 1)
            finished |= {
                number: noise[place] + 1
                for place, number in enumerate(numbers)
                if number in range(new.start, new.stop)
            }
        assert not windowed.windows
        for number, latent in enumerate(windowed.ready):
            given = canvas.conditioning_frames[number]
            np.testing.assert_array_equal(latent, canvas.latent[number] if given else finished[number])


@pytest.mark.parametrize("own", [{"context_noise": 0.25}, {"anchor": True}], ids=str)
def test_how_later_windows_see_earlier_ones_changes_later_windows_alone(pipeline, own):
    plain, other = (pipeline.generate("a ring", duration=3.0, **FIELDS, **more).frames for more in ({}, own))
    np.testing.assert_array_equal(plain[:9], other[:9])  # three latent frames
    assert (plain[9:] != other[9:]).mean() > 0.5


def test_an_anchor_is_of_the_shot_and_never_further_away_than_in_training(pipeline):
    """Latent frames are half a second apart, and the second shot begins with the tenth."""
    canvas = pipeline.prepare_latents(sketches.all_noise((81, 32, 32), 8.0))
    windowed = WindowedCanvas(canvas, 4, Context(1, anchor=True, shots=(0.0, 5.0)), (1, 2, 2), 0)
    held, found = [], {}
    while windowed.windows:
        new, anchor = windowed.windows[0][1], windowed.anchors[0]
        found[new.start] = anchor
        part, noise = windowed.next_window()
        # Where a shot has just begun there is none, and its place is left out; the last has one new frame.
        assert len(part) == (3 if new.start in (10, 20) else 4) and part.first.any() == (new.start < 10)
        gaps = np.diff(part.ends)
        if anchor is not None:
            assert gaps[0] == 4 * min(new.start - 1 - anchor, MAX_ANCHOR_GAP)
            gaps = gaps[1:]
        assert (gaps == 4).all()
        windowed.put(noise)
        held.append(windowed.held - len(windowed.ready))
    # Its own first frame is not there before the window that begins with it.
    assert found == {0: None, 4: 0, 6: 0, 8: 0, 10: None, 12: 10, 14: 10, 16: 10, 18: 10, 20: 10}
    assert held[-1] == 0 and max(held) <= 4, "an anchor is forgotten with its shot"


def test_videos_too_large_to_be_held_together_are_made_one_after_another(pipeline, monkeypatch):
    requests = [Request("a ring", duration=4.0, seed=i, **FIELDS) for i in range(3)]
    together = [video.frames for video in pipeline.generate_batch(requests)]
    size = 4 * pipeline.prepare_latents(text_to_video(pipeline, requests[0]).sketch).latent.size
    monkeypatch.setattr(denoise, "MAX_HELD", 2 * size - 1)
    reports: list[tuple[int, int]] = []
    streams, seen = pipeline.stream_batch(requests, lambda *at: reports.append(at)), []
    for stream, whole in zip(streams, together, strict=True):
        ours = stream.whole().frames
        assert np.abs(ours.astype(int) - whole).max() <= 1
        seen.append(reports[-1][0])
    own = reports[-1][1] // 3
    assert seen == [own, 2 * own, 3 * own], "none was begun before the one before it was done"
    assert reports == sorted(reports) and reports[0][0] == 0


def test_a_canvas_that_is_given_whole_waits_for_no_other(pipeline, monkeypatch):
    monkeypatch.setattr(denoise, "MAX_HELD", 1)
    clip = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    given = sketches.Sketch(clip, np.zeros(clip.shape[:3], np.float32), 8.0)
    jobs = [Job(sketch, (), SETTINGS) for sketch in (given, sketches.all_noise((9, 32, 32), 8.0))]
    canvases = [pipeline.prepare_latents(job.sketch) for job in jobs]
    same, generated = denoise.denoise(pipeline, jobs, canvases)
    np.testing.assert_array_equal(same.latent, canvases[0].latent)
    assert generated.latent.any((1, 2, 3)).all()


def test_a_storyboard_of_words_holds_nothing_and_other_abilities_stream_what_is_painted_forward(pipeline):
    cards = (Card(0.0, "a ring"), Card(2.0, "a star"))
    board = Storyboard(cards, duration=4.0, fps=8.0, resolution=32, aspect=1.0)
    assert storyboard(pipeline, board).sketch.all_noise
    clip = Video(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8), 8.0)
    for backward in (False, True):
        job = temporal_abilities.extend(
            pipeline, clip, 8.0, "a ring", backward=backward, steps=2, guidance=1.0
        )
        reports: list[tuple[int, int]] = []
        (stream,) = pipeline.make_streams([job], lambda *at, reports=reports: reports.append(at))
        next(iter(stream))
        done, in_all = reports[-1] if reports else (0, 1)
        # What is generated backward is final when the beginning is there.
        assert done == in_all if backward else done < in_all / 2
        assert len(list(stream)) == 72


@pytest.mark.parametrize(("fault", "status"), [(KeyboardInterrupt(), 130), (UserError("It rains."), 2)])
def test_a_run_that_stops_leaves_the_old_file_and_no_half_one(monkeypatch, tmp_path, capsys, fault, status):
    made = []

    class Stopped:
        request_defaults = staticmethod(dict)

        def stream_batch(self, requests, progress):
            return [VideoStream(self.frames(), 200, (32, 32), 8.0)]

        def check(self, request): ...

        def frames(self):
            for number in range(150):  # more than the encoder looks ahead: it has begun to write
                made.append(number)
                yield np.full((32, 32, 3), number, np.uint8)
            raise fault

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load", lambda name, lazy: Stopped())
    (tmp_path / "out.mp4").write_bytes(b"good")
    assert cli.main(["generate", "a ring", "--seconds", "25"]) == status
    assert len(made) == 150 and (tmp_path / "out.mp4").read_bytes() == b"good"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert capsys.readouterr().err.splitlines()[-1] == ("stopped" if status == 130 else "error: It rains.")


def test_a_stream_is_saved_as_a_video_is(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), np.uint8)
    stream = lambda: VideoStream(iter(frames), 6, (16, 24), 8.0)
    for suffix in (".gif", ".png"):
        ours, theirs = (
            stream().save(tmp_path / f"a{suffix}"),
            Video(frames, 8.0).save(tmp_path / f"b{suffix}"),
        )
        assert ours.read_bytes() == theirs.read_bytes()
    assert read_video(stream().save(tmp_path / "a.mp4")).frames.shape == frames.shape
    untouched = stream()
    with pytest.raises(UserError, match=r"saved as .mp4, .webm, .gif, .png"):
        untouched.save(tmp_path / "a.avi")
    assert len(list(untouched)) == 6
    with pytest.raises(UserError, match="come once: make it again"):
        untouched.whole()
