"""Tiles and streams of the autoencoder: the whole frame's results, one program, memory that time doesn't fill."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.checkpoints.components import Bundle
from sora_jax.data import encode as encoding
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.video import Video, read_video, write_frames
from sora_jax.models import tiles as module
from sora_jax.models.text import TextEncoder
from sora_jax.models.tiles import Tiles, decode_stream, encode_stream
from sora_jax.models.vae import VAE, VAEConfig
from sora_jax.pipeline import sketches
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.vae_processor import VaeProcessor, to_bytes

CONFIG = VAEConfig(
    channels=3,
    encoder_widths=(4, 6, 8),
    encoder_blocks=(0, 0, 1),
    decoder_widths=(4, 6, 8),
    decoder_blocks=(0, 1, 1),
    latent_mean=(0.5, -0.25, 0.125),
    latent_std=(2.0, 0.5, 1.5),
)
RNG = np.random.default_rng(0)


def receptive_field(config: VAEConfig) -> tuple[int, int]:
    """Radius in latent cells, along height or width, of the encoder's and of the decoder's receptive field.

    Two convolutions a block reach one cell of their stage each; a cell of stage i has its strides' product of pixels.
    """
    pixels, reaches = [1, 1], [[0, 0], [0, 0]]
    for i, stride in enumerate(config.strides):
        for axis in (0, 1):
            pixels[axis] *= stride[1 + axis]
            for way, blocks in enumerate((config.encoder_blocks, config.decoder_blocks)):
                reaches[way][axis] += 2 * blocks[i] * pixels[axis]
    encoder, decoder = (
        max(math.ceil(far / by) for far, by in zip(way, pixels, strict=True)) for way in reaches
    )
    return encoder, decoder


FULL = Tiles(size=9, halo=max(receptive_field(CONFIG)), blend=1, chunk=2)
WHOLE = Tiles(size=1000, chunk=3)  # tests/models/test_vae.py holds streams against whole clips
SIZES = [(12, 23), (30, 8)]  # in cells; the second is not cut across


@pytest.fixture(scope="module")
def model() -> VAE:
    """No parameter is zero, so that every layer matters."""
    shapes = jax.eval_shape(lambda: VAE(CONFIG, rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda x: (RNG.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(np.float32), shapes
    )


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (frames, height, width, 3), np.uint8)


def latent(frames: int, height: int, width: int) -> np.ndarray:
    return 0.3 * RNG.standard_normal((frames, height, width, 3)).astype(np.float32)


def joined(pieces: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(pieces))


def test_the_reach_is_how_far_one_cell_is_seen(model):
    """A change of one cell shows in the last pixels that the reach allows, and in none behind them."""
    encoder, decoder = receptive_field(CONFIG)
    assert (encoder, decoder) == (2, 3) and receptive_field(VAEConfig()) == (5, 9)
    before = latent(1, 1, 23)
    after = before.copy()
    after[:, :, 11] += 5
    shown = np.abs(joined(decode_stream(model, after)) - joined(decode_stream(model, before))).max((0, 1, 3))
    seen = np.flatnonzero(shown.reshape(23, 8).max(1))
    assert (seen[0], seen[-1]) == (11 - decoder, 11 + decoder)
    frames = noise(1, 8, 23 * 8)
    changed = frames.copy()
    changed[:, :, 88:96] ^= 255
    off = np.abs(joined(encode_stream(model, changed)) - joined(encode_stream(model, frames))).max((0, 1, 3))
    seen = np.flatnonzero(off)
    assert (seen[0], seen[-1]) == (11 - encoder, 11 + encoder)


@pytest.mark.parametrize("cells", SIZES)
def test_with_the_full_halo_tiles_are_the_whole(model, cells):
    y, x = cells
    latents, frames = latent(4, y, x), noise(13, 8 * y, 8 * x)
    whole, coded = joined(decode_stream(model, latents, WHOLE)), joined(encode_stream(model, frames, WHOLE))
    assert whole.std() > 0.1
    np.testing.assert_allclose(joined(decode_stream(model, latents, FULL)), whole, atol=1e-4)
    np.testing.assert_allclose(joined(encode_stream(model, frames, FULL)), coded, atol=1e-4)


def test_without_a_halo_tiles_are_not_the_whole(model):
    latents = latent(1, 12, 22)  # tiles of 12 overlap by no more than they must
    whole = joined(decode_stream(model, latents, WHOLE))
    errors = [
        np.abs(joined(decode_stream(model, latents, Tiles(12, halo, 2, 2))) - whole).max() for halo in (0, 3)
    ]
    assert errors[0] > 0.01 and errors[1] < 1e-4, errors


def test_two_programs_serve_a_frame_whatever_its_length(model):
    own = Tiles(size=9, halo=1, blend=1, chunk=2)
    for sizes, (y, x, frames) in enumerate(((17, 12, 9), (17, 12, 21), (11, 23, 5), (11, 23, 13))):
        if sizes % 2 == 0:
            for function in (module._encode_chunk, module._decode_chunk):
                function.clear_cache()
        coded = joined(encode_stream(model, noise(frames, 8 * y, 8 * x), own))
        assert joined(decode_stream(model, coded, own)).shape == (frames, 8 * y, 8 * x, 3)
        # The first frame of a stream, and what comes later.
        assert module._encode_chunk._cache_size() == module._decode_chunk._cache_size() == 2


@pytest.mark.parametrize("own", [Tiles(), Tiles(8, 1, 1), Tiles(12, 3, 2), Tiles(9, 0, 3)])
def test_tiles_are_of_the_shape_that_costs_least(own):
    for height, width in ((1, 1), (5, 200), (68, 120), (90, 160), (135, 240), (64, 65), (33, 200)):
        high, wide = own.shape(height, width)
        assert high * wide <= own.size**2 and high <= height and wide <= width
        assert height * width > own.size**2 or (high, wide) == (height, width)
        square = np.prod([len(own.starts(side)) * min(own.size, side) / side for side in (height, width)])
        assert 1 <= own.cost(height, width) <= square + 1e-9
    assert Tiles().cost(68, 120) < 1.25  # 960×540: three times its pixels in square tiles of one size


@pytest.mark.parametrize("cells", range(1, 60, 7))
@pytest.mark.parametrize("own", [Tiles(8, 1, 1), Tiles(8, 1, 0), Tiles(12, 3, 2), Tiles(9, 0, 3)])
def test_tiles_cover_a_side_and_keep_their_halo(cells, own):
    cuts, size = own.cuts(cells, 8), min(own.size, cells)
    total = np.zeros(cells * 8)
    for i, (start, weights) in enumerate(cuts):
        total[start * 8 : (start + size) * 8] += weights
        kept = np.flatnonzero(weights)
        assert i == 0 or kept[0] >= 8 * own.halo
        assert i == len(cuts) - 1 or kept[-1] < 8 * (size - own.halo)
    assert cuts[0][0] == 0 and cuts[-1][0] + size == cells
    np.testing.assert_allclose(total, 1, atol=1e-6)


def counted(items: np.ndarray, taken: list[int]) -> Iterator[np.ndarray]:
    for item in items:
        taken.append(1)
        yield item


def test_a_stream_yields_before_it_reads_on_and_keeps_no_more_than_a_chunk(model):
    taken: list[int] = []
    seen = []
    for clip in decode_stream(model, counted(latent(8, 12, 9), taken), Tiles(9, 1, 1, 2)):
        seen.append((len(taken), len(clip)))
    assert seen == [(1, 1), (3, 8), (5, 8), (7, 8), (8, 4)]
    taken.clear()
    seen = [
        (len(taken), len(each))
        for each in encode_stream(model, counted(noise(14, 96, 72), taken), Tiles(9, 1, 1, 2))
    ]
    assert seen == [(1, 1), (9, 2), (14, 2)]  # the last group is filled up


def test_what_comes_later_leaves_a_stream_as_it_is_to_the_bit(model):
    latents, own = latent(6, 12, 20), Tiles(9, 1, 1, 2)
    whole = joined(decode_stream(model, latents, own))
    for length in (1, 2, 4):
        part = joined(decode_stream(model, latents[:length], own))
        np.testing.assert_array_equal(part, whole[: 1 + 4 * (length - 1)])


@pytest.mark.parametrize("fields", [{"size": 9, "halo": 4, "blend": 1}, {"halo": -1}, {"chunk": 0}])
def test_tiles_that_can_not_cover_a_frame_are_refused(fields):
    with pytest.raises(UserError, match="can't cover a frame"):
        Tiles(**fields)


def test_frames_off_the_grid_are_refused(model):
    with pytest.raises(UserError, match="12×16 pixels are no multiple of 8×8"):
        list(encode_stream(model, noise(1, 12, 16)))


def test_the_engine_reconstructs_large_frames_tile_by_tile(monkeypatch, model):
    pipeline = Pipeline(Bundle("tiny", model))
    picture = Video(noise(1, 60, 170), 8.0)
    whole = pipeline.reconstruct(picture).frames.astype(int)
    assert whole.std() > 5
    done: list[tuple[int, ...]] = []
    for name in ("_encode_chunk", "_decode_chunk"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda vae, tile, past, real=real: done.append(tile.shape) or real(vae, tile, past)
        )
    pipeline.tiles = Tiles(9, max(receptive_field(CONFIG)), 0)
    tiled = pipeline.reconstruct(picture).frames.astype(int)
    assert np.abs(tiled - whole).max() <= 1
    assert done == [(1, 1, 64, 80, 3)] * 4 + [(1, 1, 8, 10, 3)] * 4


def decode_floats(engine: VaeProcessor, *arguments) -> np.ndarray:
    return np.stack(list(engine.decode_frames(*arguments)))


def test_a_canvas_is_decoded_frame_by_frame_across_seams(model, tmp_path):
    engine = VaeProcessor(Bundle("tiny", model))
    first, second = (noise(frames, 16, 16) for frames in (37, 18))
    sketch = sketches.connect(first, second, 11, 8.0)
    canvas = engine.prepare_latents(sketch)
    generated = canvas.init_sigma.any((1, 2))
    shape = sketch.frames.shape[:3]
    whole = decode_floats(engine, canvas, *shape, generated)
    assert len(whole) == len(sketch.frames)
    frames = [to_bytes(frame) for frame in engine.decode_frames(canvas, *shape)]
    assert np.abs(np.stack(frames).astype(int) - engine.decode_latents(canvas, *shape)).max() <= 1
    # Not byte by byte: what x264 writes may depend on how its threads meet.
    straight = read_video(write_frames(tmp_path / "straight.mp4", iter(frames), canvas.fps))
    held = read_video(Video(np.stack(frames), canvas.fps).save(tmp_path / "held.mp4"))
    assert straight.fps == held.fps and straight.frames.shape == held.frames.shape
    assert np.abs(straight.frames.astype(int) - held.frames).mean() < 1
    short = decode_floats(engine, canvas, 20, *shape[1:], generated)
    np.testing.assert_array_equal(short, whole[:20])
    # The generated group that ends with frame 48 shows the second clip's first: the eight before it are moved.
    moved = np.abs(whole - decode_floats(engine, canvas, *shape)).max((1, 2, 3))
    np.testing.assert_array_equal(moved > 0, (np.arange(len(whole)) >= 40) & (np.arange(len(whole)) < 48))


def test_large_clips_are_encoded_for_training_tile_by_tile(monkeypatch, model):
    clips = [Clip(Video(noise(9, 96, 184), 8.0), {"short": ""}, (), str(i)) for i in range(2)]
    records = encoding.make_encoder(model, TextEncoder.tiny())(clips)
    monkeypatch.setattr(encoding, "TILES", FULL)
    monkeypatch.setattr(VAE, "to_latent", None)
    for record, ours in zip(records, encoding.make_encoder(model, TextEncoder.tiny())(clips), strict=True):
        np.testing.assert_allclose(ours["latent"], record["latent"], atol=1e-4)
