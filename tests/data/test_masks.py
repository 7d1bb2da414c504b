"""Training's canvases: each kind is drawn as often as it should be, and reaches the objective as it was drawn."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.packed import pack_stream
from helpers.tiny_model import TEXT, tiny_bundle
from helpers.tiny_run import tiny_config
from hypothesis import example, given
from hypothesis import strategies as st

from sora_jax.data.encode import make_encoder
from sora_jax.data.masks import draw_canvas, draw_layout
from sora_jax.data.pipeline import SEGMENT_CONDITIONS, PipelineConfig, draw_segment, make_pipeline
from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.video import Video
from sora_jax.models.text import load_text_encoder
from sora_jax.tokens.canvas import Canvas
from sora_jax.tokens.packing import PackedBatch
from sora_jax.tokens.patches import coordinates
from sora_jax.tokens.spans import frames_shown, split_into_spans
from sora_jax.train.dit import DiTObjective

LAYOUTS = ("none", "last", "ends", "even", "scattered", "middle")
CANVASES = ("none", "first", "begin", "box", "margins", "levels", "context", "anchor")


# Layouts.


@given(st.integers(0, 12), st.sampled_from((2, 4, 8)), st.sampled_from(LAYOUTS), st.integers(0, 10**6))
@example(1, 4, "scattered", 1020)  # of which streams leave the two frames that are given
def test_a_layout_stays_inside_the_clip_and_leaves_something_to_paint(groups, stride, kind, seed):
    frames = 1 + stride * groups
    fixed = draw_layout(np.random.default_rng(seed), frames, {kind: 1.0}, stride=stride)
    assert 1 <= len(fixed) <= frames and not fixed.all()
    assert max(stream.ends[-1] for stream in split_into_spans(fixed, stride)) < frames
    if kind == "none" or frames == 1:
        assert not fixed.any() and len(fixed) == frames
    elif fixed.any() and kind != "even":
        assert frames - len(fixed) < stride, "no more is cut off than streams run over"


@pytest.mark.parametrize("frames", [9, 17, 25])
def test_every_kind_of_layout_gives_what_its_name_says(frames):
    def drawn(kind: str) -> list[np.ndarray]:
        return [draw_layout(np.random.default_rng(seed), frames, {kind: 1.0}) for seed in range(100)]

    for fixed in drawn("last"):
        assert fixed[-1] and not fixed[0] and np.count_nonzero(np.diff(fixed)) == 1
    for fixed in drawn("ends"):
        assert fixed[0] and np.count_nonzero(np.diff(fixed)) == (2 if fixed[-1] else 1)
    # The other end is lost where streams would run over the clip's.
    assert np.mean([fixed[-1] for fixed in drawn("ends")]) > 0.8
    for fixed in drawn("even"):
        (gap,) = {*np.diff(np.flatnonzero(fixed))} or {frames}
        assert fixed[0] and 2 <= gap <= 5 and len(fixed) - np.flatnonzero(fixed)[-1] <= gap
    for fixed in drawn("scattered"):
        assert 1 <= np.count_nonzero(fixed) <= 3
    for fixed in drawn("middle"):
        assert fixed.any() and not fixed[0] and np.count_nonzero(np.diff(fixed)) <= 2
    lengths = Counter(np.count_nonzero(fixed) for fixed in drawn("last"))
    assert lengths[1] > 25 and sum(lengths[n] for n in (1, 5, 9, 13, 17, 21)) > 75, "mostly 1 + 4k"


@pytest.mark.parametrize("frames, kept", [(25, 22), (22, 22), (21, 18), (9, 9), (1, 1)])
def test_the_first_frames_are_given_where_a_number_says_so(frames, kept):
    fixed = draw_layout(np.random.default_rng(0), frames, {"last": 1.0}, given=10)
    assert np.flatnonzero(fixed).tolist() == (list(range(10)) if kept > 10 else [])
    # Of ten the first is alone, the others are groups of four after one.
    assert len(fixed) == kept and [span.frames for span in split_into_spans(fixed)][:1] == [
        1 if kept > 10 else kept
    ]


def test_layouts_are_drawn_by_weight():
    rng = np.random.default_rng(0)
    given = [draw_layout(rng, 17, {"none": 3.0, "last": 1.0}).any() for _ in range(2000)]
    assert np.mean(given) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("weights", [{"nowhere": 1.0}, {"none": 0.0}, {}])
def test_unknown_layouts_and_no_layout_at_all_are_refused(weights):
    with pytest.raises(UserError, match=r"latents\.layouts.*choose from none, last, ends"):
        draw_layout(np.random.default_rng(0), 9, weights)


# Canvases.


def plain(t: int = 5, y: int = 4, x: int = 6) -> Canvas:
    latent = np.random.default_rng(0).standard_normal((t, y, x, 3)).astype(np.float32)
    return Canvas(latent, np.ones((t, y, x), np.float32), 4 * np.arange(t), np.arange(t) == 0, 8.0)


def streams() -> Canvas:
    """Frames 0 and 9 to 12 of 13 are given."""
    fixed = np.isin(np.arange(13), (0, 9, 10, 11, 12))
    spans = split_into_spans(fixed)
    ends = np.concatenate([stream.ends for stream in spans])
    start = np.array([not fixed[shown].all() for shown in frames_shown(spans, 13)], np.float32)
    first = np.concatenate([stream.ends == stream.begin for stream in spans])
    latent = np.zeros((len(ends), 4, 6, 3), np.float32)
    return Canvas(latent, np.broadcast_to(start[:, None, None], latent.shape[:3]), ends, first, 8.0)


def kind_of(start: np.ndarray) -> str:
    """What was drawn, by how it looks."""
    if ((start > 0) & (start < 1)).any():
        return "levels"
    if (start == 1).all():
        return "none"
    if np.isin(start.mean((1, 2)), (0, 1)).all():
        return "first" if start[1:].all() else "begin"
    assert (start == start[0]).all(), "a box or margins are where they are all the time"
    return "box or margins"


@given(
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 7), st.sampled_from(CANVASES), st.integers(0, 10**6)
)
def test_something_is_always_painted_and_latents_stay_what_they_are(t, y, x, kind, seed):
    whole = plain(t, y, x).crop(0, 0, y, x)
    drawn = draw_canvas(np.random.default_rng(seed), whole, {kind: 1.0}, 0.5, 4)
    assert drawn.init_sigma.max() > 0 and drawn.init_sigma.min() >= 0 and drawn.init_sigma.dtype == np.float32
    assert len(drawn) <= 4 and drawn.frame == (y, x) and drawn.fps == 8.0
    stay = drawn.ends // 4
    np.testing.assert_array_equal(drawn.latent, whole.latent[stay])
    np.testing.assert_array_equal(drawn.ends, whole.ends[stay])
    assert drawn.first.tolist() == (stay == 0).tolist()
    assert (np.diff(stay)[kind == "anchor" :] == 1).all(), "frames are missing after an anchor alone"
    if kind == "levels":
        levels = np.unique(drawn.init_sigma[drawn.init_sigma < 1])
        assert len(levels) == 1 and 0 < levels[0] < 1 and drawn.init_sigma.min() > 0
        assert (drawn.init_sigma == drawn.init_sigma[:, :1, :1]).all(), "whole frames have a level"
    if kind == "first" and len(drawn) > 1:
        assert not drawn.init_sigma[0].any() and drawn.init_sigma[1:].all()


@pytest.mark.parametrize("kind", ["context", "anchor"])
@pytest.mark.parametrize("t", [1, 2, 3, 7])
def test_a_later_window_is_context_at_one_low_level_and_then_what_is_generated(kind, t):
    """As the sampler makes them: begun in the middle of a span, or after the clip's first frame as an anchor."""
    drawn = [draw_canvas(np.random.default_rng(seed), plain(t), {kind: 1.0}, 0.0, 9) for seed in range(400)]
    anchored = kind == "anchor" and t > 2
    levels, lengths, gaps = [], Counter(), Counter()
    for canvas in drawn:
        if anchored:
            assert canvas.first[0] and not canvas.init_sigma[0].any()
            gaps[int(canvas.ends[1]) // 4 - 1] += 1
        window = canvas.part(slice(int(anchored), None))
        assert window.ends[-1] == 4 * (t - 1) and window.first.any() == (t < 3)
        assert (window.init_sigma == window.init_sigma[:, :1, :1]).all(), "whole frames have a level"
        level = window.init_sigma[0, 0, 0]
        levels.append(float(level))
        context = np.count_nonzero(window.init_sigma[:, 0, 0] < 1)
        assert (window.init_sigma[:context] == level).all() and (window.init_sigma[context:] == 1).all()
        lengths[context] += 1
    if t == 1:
        assert set(levels) == {1.0}, "a picture has no context"
        return
    noised = [level for level in levels if level]
    assert (
        len(noised) == pytest.approx(300, abs=40) and 0.05 <= min(noised) < 0.1 and 0.45 < max(noised) <= 0.5
    )
    assert set(lengths) == set(range(1, max(t - 1, 2)))
    assert set(gaps) == (set(range(t - 2)) if anchored else set())


def test_boxes_and_margins_are_rectangles_each_the_others_opposite():
    for seed in range(50):
        box, margins = (
            draw_canvas(np.random.default_rng(seed), plain(), {kind: 1.0}, 0.0, 9).init_sigma[0]
            for kind in ("box", "margins")
        )
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, np.outer(rows, columns))
        for side in (rows, columns):
            assert np.count_nonzero(np.diff(np.pad(side.astype(int), 1))) == 2
        if not box.all():
            np.testing.assert_array_equal(margins, 1 - box)


def test_canvases_are_drawn_by_weight():
    weights = {"none": 0.3, "first": 0.2, "begin": 0.1, "box": 0.1, "margins": 0.1, "levels": 0.2}
    rng = np.random.default_rng(0)
    kinds = Counter(kind_of(draw_canvas(rng, plain(), weights, 0.0, 9).init_sigma) for _ in range(2000))
    shares = {kind: count / 2000 for kind, count in kinds.items()}
    # Of four ways to begin one is the first frame alone.
    wanted = {"none": 0.3, "first": 0.225, "begin": 0.075, "box or margins": 0.2, "levels": 0.2}
    assert shares == pytest.approx(wanted, abs=0.04)


def test_no_weights_give_nothing_and_unknown_ones_are_refused():
    assert (draw_canvas(np.random.default_rng(0), plain(), {}, 0.0, 9).init_sigma == 1).all()
    with pytest.raises(UserError, match=r"pipeline\.canvases\.corner is unknown: choose from none, first"):
        draw_canvas(np.random.default_rng(0), plain(), {"corner": 1.0}, 0.0, 9)


def test_what_a_layout_gives_is_given_whatever_is_drawn():
    for kind in CANVASES:
        drawn = draw_canvas(np.random.default_rng(0), streams(), {kind: 1.0}, 0.0, 9)
        np.testing.assert_array_equal(drawn.init_sigma, streams().init_sigma)


def test_windows_of_time_are_taken_as_often_as_told_and_always_of_what_is_too_long():
    rng = np.random.default_rng(0)
    lengths = np.array([len(draw_canvas(rng, plain(), {}, 0.3, 9)) for _ in range(1000)])
    # One length in four is the whole clip's.
    assert np.mean(lengths < 5) == pytest.approx(0.3 * 3 / 4, abs=0.04)
    assert set(lengths) == {2, 3, 4, 5}
    windows = [draw_canvas(rng, streams(), {"first": 1.0}, 0.0, 3) for _ in range(200)]
    assert {len(window) for window in windows} == {2, 3}
    assert {int(window.ends[0]) for window in windows} == {0, 4, 8, 9, 10, 11}
    assert all(window.init_sigma.any() for window in windows)
    assert len(draw_canvas(rng, plain(), {}, 0.0, 1)) == 1


# From clips to the objective.


class Shots:
    """Clips of noise; every second one has two shots."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (17 if index % 3 else 1, 32, 32, 3), np.uint8)
        timed = ((0.0, "a red ring"), (1.1, "a blue star"))[: 1 + index % 2]
        return Clip(Video(frames, 7.0), {"short": "a ring"}, timed, f"clip-{index}")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    encode = make_encoder(tiny_bundle().vae, load_text_encoder(TEXT), dict.fromkeys(LAYOUTS, 1.0))
    records = [encode([Shots()[index]])[0] for index in range(60)]
    half = {"text": np.float16, "time": np.float16}  # as the cache keeps them
    for record in records:
        for caption in record["captions"].values():
            caption.update({name: caption[name].astype(dtype) for name, dtype in half.items()})
    return records


CONFIG = PipelineConfig(
    seq_len=40,
    text_len=24,
    batch_size=2,
    max_segments=6,
    canvases=dict.fromkeys(CANVASES, 1.0),
    temporal_crop_prob=0.4,
    frame_tokens=2,
    caption_weights={"short": 0.3, "timed": 1.0},
    num_packing_bins=8,
)


def test_a_record_means_to_give_what_its_streams_show_of_given_frames_alone(records):
    """A group that runs over a given frame shows others too: it must be generated, as when a model is used."""
    for index, record in enumerate(records):
        frames = len(Shots()[index].video.frames)
        begins = np.flatnonzero(record["first"])
        for j, end in enumerate(record["ends"]):
            assert end < frames
            if record["given"][j] and not record["first"][j]:
                assert record["given"][begins[begins <= j][-1] : j].all(), "given after what is generated"
                assert not any(end - 4 < record["ends"][k] <= end for k in begins[begins > j])
    several = [record for record in records if record["first"].sum() > 1]
    assert len(several) > 15 and all(record["given"].any() for record in several)
    assert all(not record["given"].all() for record in records)


def test_runs_of_every_kind_have_conditions_enough_and_the_words_of_their_shots(records):
    seen: Counter[int] = Counter()
    for seed in range(5):
        for index, record in enumerate(records):
            segment = draw_segment(record, np.random.default_rng((seed, index)), CONFIG)
            assert 1 <= segment.num_conditions <= SEGMENT_CONDITIONS
            assert segment.init_sigma.max() > 0 and len(segment.patches) <= CONFIG.seq_len
            shots = set(segment.caption_time[segment.init_sigma > 0])
            assert shots <= set(segment.text_time.tolist()), "words are found by their time, to the bit"
            seen[len(shots)] += 1
            assert segment.coords[:, 0].min() == 0
    assert seen[1] > 100 and seen[2] > 20


def test_a_window_of_a_frame_keeps_its_coordinates(records):
    record = next(record for record in records if len(record["ends"]) > 1)
    whole = coordinates((1, 4, 4), (1, 2, 2), 7.0)[:, 1:3].tolist()
    seen = set()
    for seed in range(60):
        segment = draw_segment(record, np.random.default_rng(seed), CONFIG)
        assert np.ptp(segment.coords[:, 4]) == 0 and segment.coords[0, 4] == 0.5, "half a frame's height each"
        seen |= {whole.index(place) for place in segment.coords[:, 1:3].tolist()}
    assert seen == {0, 1, 2, 3}


def test_the_pipeline_packs_canvases_of_every_kind(records):
    batches = [batch for batch, _ in zip(make_pipeline(CONFIG, records), range(30))]
    own = {batch.condition_segment_ids.shape for batch in batches}
    assert own == {(2, CONFIG.max_segments * SEGMENT_CONDITIONS + 1)}
    start = np.concatenate([batch.init_sigma[batch.segment_ids > 0] for batch in batches])
    assert (start == 0).mean() > 0.1 and (start == 1).mean() > 0.3 and ((start > 0) & (start < 1)).any()
    for batch in batches:
        np.testing.assert_array_equal(
            np.take_along_axis(batch.condition_init_sigma, batch.condition_ids, axis=1), batch.init_sigma
        )
        np.testing.assert_array_equal(
            np.take_along_axis(batch.condition_segment_ids, batch.condition_ids, axis=1),
            np.where(batch.init_sigma > 0, batch.segment_ids, 0),
        )


class Recorder:
    """Answers 0 to everything, and remembers what it was asked."""

    asked: tuple[jax.Array, PackedBatch, jax.Array]

    def __call__(self, patches: jax.Array, batch: PackedBatch, sigma: jax.Array) -> jax.Array:
        self.asked = patches, batch, sigma
        return jnp.zeros_like(patches)


@pytest.fixture(scope="module")
def batch(records) -> PackedBatch:
    segments = grain.MapDataset.source(records).random_map(
        lambda record, rng: draw_segment(record, rng, CONFIG), seed=0
    )
    stream = segments.to_iter_dataset(grain.ReadOptions(0, 0))
    return next(iter(pack_stream(stream, 40, 24, 6, 8, 8, SEGMENT_CONDITIONS)))


def ask(batch: PackedBatch, folder: Any, **flows: float) -> tuple[Recorder, float, Mapping[str, jax.Array]]:
    config = tiny_config(folder, 1)
    config.pipeline.max_segments = CONFIG.max_segments
    config.flow.update(flows)
    recorder, batch = Recorder(), jax.tree.map(jnp.asarray, batch)
    loss, others = DiTObjective(config, folder / "run").loss(recorder, batch, jax.random.key(0))
    return recorder, float(loss), others


def test_given_tokens_are_shown_clean_and_levels_are_where_training_begins(batch, tmp_path):
    recorder, _, _ = ask(batch, tmp_path, text_noise=0.0, mean=4.0)
    patches, seen, sigma = recorder.asked
    levels = np.take_along_axis(np.asarray(sigma), batch.condition_ids, axis=1)
    given = batch.conditioning_mask
    assert given.any() and not levels[given].any() and not np.asarray(sigma)[:, 0].any()
    np.testing.assert_array_equal(np.asarray(patches)[given], batch.patches[given])
    assert (levels <= batch.init_sigma).all() and (levels[batch.init_sigma > 0] > 0).all()
    lowered = (batch.init_sigma > 0) & (batch.init_sigma < 1)
    assert lowered.any() and (levels[lowered] == batch.init_sigma[lowered]).any()
    for row, ids in enumerate(batch.segment_ids):
        for segment in range(1, ids.max() + 1):
            own = (ids == segment) & (batch.init_sigma > 0)[row]
            (drawn,) = {*np.maximum.reduceat(levels[row][own], [0])}
            free = levels[row][own & (batch.init_sigma[row] == 1)]
            # One draw a segment, which what starts lower holds where it is lower still.
            assert len(set(free.tolist())) <= 1
            top = free.max() if free.size else drawn
            np.testing.assert_array_equal(levels[row][own], np.minimum(top, batch.init_sigma[row][own]))
    np.testing.assert_array_equal(seen.condition_ids, batch.condition_ids)


@pytest.mark.parametrize("per", ["segment", "sequence"])
def test_a_sigma_is_drawn_for_each_segment_or_for_each_sequence(batch, tmp_path, per):
    # No segment is so long that its sigma is shifted.
    recorder, _, _ = ask(batch, tmp_path, sigma_per=per, base_tokens=1e6)
    sigma = np.take_along_axis(np.asarray(recorder.asked[2]), batch.condition_ids, axis=1)
    free = batch.init_sigma == 1
    counts = [len(set(sigma[row, free[row]].tolist())) for row in range(len(sigma))]
    segments = [len(set(batch.segment_ids[row, free[row]].tolist()) - {0}) for row in range(len(sigma))]
    assert max(segments) > 1
    assert counts == (segments if per == "segment" else [min(count, 1) for count in segments])


def test_given_tokens_and_empty_slots_have_no_part_in_the_loss(batch, tmp_path):
    recorder, loss, others = ask(batch, tmp_path, text_noise=0.0)
    patches, _, sigma = recorder.asked
    level = np.take_along_axis(np.asarray(sigma), batch.condition_ids, axis=1)[..., None]
    generated = (batch.segment_ids > 0) & ~batch.conditioning_mask
    # x = (1 − σ) x₀ + σ ε tells the noise, and so the velocity that was to be found.
    noise = (np.asarray(patches) - (1 - level) * batch.patches)[generated] / level[generated]
    error = np.square(np.asarray(flow.velocity(batch.patches[generated], noise))).mean(-1)
    assert loss == pytest.approx(error.mean(), rel=1e-3)
    assert float(others["clean_error"]) == pytest.approx(
        (error * level[generated][:, 0] ** 2).mean(), rel=1e-3
    )


def test_words_are_dropped_by_run_and_keep_the_conditions_of_what_stays(batch, tmp_path):
    recorder, _, _ = ask(batch, tmp_path, text_dropout=0.5, text_noise=0.0)
    _, seen, _ = recorder.asked
    kept = []
    for row, ids in enumerate(batch.text_segment_ids):
        for segment in {*ids} - {0}:
            (stays,) = {*(np.asarray(seen.text_segment_ids)[row, ids == segment] == segment)}
            kept.append(stays)
    assert 0.2 < np.mean(kept) < 0.8
    assert dataclasses.replace(seen, text=batch.text).text is batch.text
