"""The autoencoder: causal in time, the same as a stream and as a whole, its folds and wavelet invertible."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sora_jax.backend import ONEDNN
from sora_jax.errors import UserError
from sora_jax.models import conv, vae
from sora_jax.models.layers import Linear
from sora_jax.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(
    channels=3,
    encoder_widths=(4, 6, 8),
    encoder_blocks=(0, 1, 1),
    decoder_widths=(4, 6, 8),
    decoder_blocks=(1, 1, 1),
    latent_mean=(0.5, -0.25, 0.125),
    latent_std=(2.0, 0.5, 1.5),
)
RNG = np.random.default_rng(0)
CLIP = RNG.uniform(-1, 1, (1, 9, 16, 16, 3)).astype(np.float32)
CHUNKINGS = [(3,), (1, 2), (2, 1), (1, 1, 1)]  # in latent frames

encode = jax.jit(VAE.encode_chunk)
decode = jax.jit(VAE.decode_chunk)


@pytest.fixture(scope="module")
def model() -> VAE:
    """No parameter is zero, so that every layer matters."""
    shapes = jax.eval_shape(lambda: VAE(CONFIG, rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda x: (RNG.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def latent(model) -> np.ndarray:
    return np.asarray(encode(model, CLIP)[0])


@pytest.mark.parametrize(
    ("frames", "latent_frames", "dtype"), [(1, 1, "float32"), (9, 3, "bfloat16"), (81, 21, "float32")]
)
def test_one_and_four_k_frames_are_one_and_k_latent_frames(frames, latent_frames, dtype):
    config = VAEConfig(dtype=dtype)
    make = lambda: VAE(config, rngs=nnx.Rngs(0))
    mean, logvar = jax.eval_shape(lambda clip: make().encode(clip), jnp.zeros((2, frames, 24, 40, 3)))
    assert mean.shape == logvar.shape == (2, latent_frames, 3, 5, 16)
    back = jax.eval_shape(lambda latent: make().decode(latent), mean)
    assert back.shape == (2, frames, 24, 40, 3)
    assert mean.dtype == logvar.dtype == back.dtype == jnp.float32


@pytest.mark.parametrize("chunks", CHUNKINGS)
def test_a_stream_is_encoded_as_the_whole(model, chunks):
    means, logvars, past, start = [], [], None, 0
    for latent_frames in chunks:
        frames = 4 * latent_frames - (3 if past is None else 0)
        mean, logvar, past = encode(model, CLIP[:, start : start + frames], past)
        means.append(mean)
        logvars.append(logvar)
        start += frames
    whole_mean, whole_logvar, _ = encode(model, CLIP)
    np.testing.assert_allclose(np.concatenate(means, axis=1), whole_mean, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(logvars, axis=1), whole_logvar, atol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKINGS)
def test_a_stream_is_decoded_as_the_whole(model, latent, chunks):
    clips, past, start = [], None, 0
    for latent_frames in chunks:
        clip, past = decode(model, latent[:, start : start + latent_frames], past)
        clips.append(clip)
        start += latent_frames
    np.testing.assert_allclose(np.concatenate(clips, axis=1), decode(model, latent)[0], atol=1e-5)


def test_an_image_is_a_clip_of_one_frame(model, latent):
    mean = encode(model, CLIP[:, :1])[0]
    np.testing.assert_allclose(mean, latent[:, :1], atol=1e-5)
    np.testing.assert_allclose(decode(model, mean)[0], decode(model, latent)[0][:, :1], atol=1e-5)


def test_no_latent_frame_sees_a_later_frame(model):
    """Latent frame j holds frames up to 4j: a change of frame f shows from ⌈f/4⌉ on, there and not before."""
    clips = np.repeat(CLIP, 10, axis=0)
    for frame in range(9):
        clips[1 + frame, frame] *= -1
    means, logvars, _ = encode(model, clips)
    for moments in (np.asarray(means), np.asarray(logvars)):
        difference = np.abs(moments[1:] - moments[:1]).max(axis=(2, 3, 4))
        for frame in range(9):
            first = -(-frame // 4)
            assert (difference[frame, :first] < 1e-6).all(), f"frame {frame} shows in an earlier latent frame"
            assert difference[frame, first] > 1e-4, f"frame {frame} does not show in its own latent frame"


def test_no_frame_sees_a_later_latent_frame(model, latent):
    """Latent frame j holds frames 4j − 3 to 4j, and frame 0 is latent frame 0's."""
    latents = np.repeat(latent, 4, axis=0)
    for j in range(3):
        latents[1 + j, j] += 1
    clips = np.asarray(decode(model, latents)[0])
    difference = np.abs(clips[1:] - clips[:1]).max(axis=(2, 3, 4))
    for j in range(3):
        first = max(0, 4 * j - 3)
        assert (difference[j, :first] < 1e-6).all(), f"latent frame {j} shows in an earlier frame"
        assert (difference[j, first : 4 * j + 1] > 1e-4).all(), (
            f"latent frame {j} does not show in its own frames"
        )


def test_a_block_begins_as_the_identity():
    x = jnp.asarray(RNG.normal(size=(1, 2, 4, 4, 6)), jnp.float32)
    block = vae.Block(6, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jax.jit(lambda x: block(x, conv.ConvCache()))(x), x)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (4, 1, 3)])
def test_unfold_undoes_fold(stride):
    a, b, c = stride
    x = np.arange(2 * 2 * a * 3 * b * 2 * c * 5).reshape(2, 2 * a, 3 * b, 2 * c, 5)
    folded = conv.space_to_depth(x, stride)
    assert folded.shape == (2, 2, 3, 2, a * b * c * 5)
    np.testing.assert_array_equal(conv.depth_to_space(folded, stride), x)
    np.testing.assert_array_equal(folded[1, 1, 2, 0], x[1, a:, 2 * b :, :c].ravel())


def test_the_wavelet_is_orthonormal_and_its_own_inverse():
    x = RNG.normal(size=(2, 3, 8 * 3)).astype(np.float32)
    np.testing.assert_allclose(vae.haar(vae.haar(x)), x, atol=1e-5)
    matrix = np.asarray(vae.haar(jnp.eye(8)))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(8), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), 8**-0.5, rtol=1e-6)


def test_the_wavelet_of_a_still_flat_cube_is_one_coefficient_a_colour():
    cube = np.broadcast_to(np.array([0.1, 0.2, 0.3], np.float32), (1, 2, 2, 2, 3))
    coefficients = np.asarray(vae.haar(conv.space_to_depth(cube, (2, 2, 2)))).reshape(8, 3)
    np.testing.assert_allclose(coefficients[0], np.sqrt(8) * np.array([0.1, 0.2, 0.3]), rtol=1e-5)
    np.testing.assert_allclose(coefficients[1:], 0, atol=1e-6)


def test_the_wavelet_within_projections_is_the_wavelet_of_pixels(rng=RNG):
    """`Linear`'s `before` and `after` against the maps where they stand."""
    linear = Linear(24, 24, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.asarray(rng.normal(size=24), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32)
    np.testing.assert_allclose(linear(x, before=vae.haar), linear(vae.haar(x)), atol=1e-5)
    np.testing.assert_allclose(linear(x, after=vae.haar), vae.haar(linear(x)), atol=1e-5)
    both = linear(x, before=vae.haar, after=vae.haar)
    assert np.abs(both - linear(x)).max() > 0.1


def _sum_over_taps(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Causal convolution by its definition: out[t] = Σ kernel[i] x[t − 2 + i], space padded with zeros."""
    _, T, Y, X, _ = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
    return sum(padded[:, i : i + T - 2, j : j + Y, k : k + X] @ kernel[i, j, k] for i, j, k in taps)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_causal_convolution_is_one_on_every_path(backend, monkeypatch):
    x, kernel, back = (
        RNG.normal(size=shape).astype(np.float32)
        for shape in ((2, 5, 4, 6, 3), (3, 3, 3, 3, 4), (2, 3, 4, 6, 4))
    )
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    out, pull = jax.vjp(lambda x, kernel: conv.causal_conv(x, kernel), x, kernel)
    dx, dkernel = pull(back)
    np.testing.assert_allclose(out, _sum_over_taps(x, kernel), atol=1e-4)
    # The map is linear in each argument: its gradients are right if they give the same inner products.
    np.testing.assert_allclose(np.vdot(dx, x), np.vdot(back, out), rtol=1e-4)
    np.testing.assert_allclose(np.vdot(dkernel, kernel), np.vdot(back, out), rtol=1e-4)
    reference = lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    expected, pull = jax.vjp(reference, x, kernel)
    for ours, theirs in zip((out, dx, dkernel), (expected, *pull(back)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "flags", "three_axes"),
    [("cpu", "", False), ("cpu", f"{ONEDNN}=true", True), ("tpu", "", True)],
)
def test_which_form_the_convolution_takes(monkeypatch, backend, flags, three_axes):
    x, kernel = jnp.ones((1, 3, 4, 4, 2)), jnp.ones((3, 3, 3, 2, 2))
    calls, real = [], conv.conv3d
    monkeypatch.setattr(conv, "conv3d", lambda *arguments: calls.append(1) or real(*arguments))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("XLA_FLAGS", flags)
    conv.causal_conv(x, kernel)
    assert bool(calls) == three_axes


@pytest.mark.parametrize(
    ("shape", "has_past", "says"),
    [
        ((1, 5, 12, 16, 3), False, "12×16 pixels.*8×8"),
        ((1, 5, 16, 20, 3), False, "16×20 pixels.*8×8"),
        ((1, 4, 16, 16, 3), False, "4 frames.*1, 5, 9"),
        ((1, 0, 16, 16, 3), False, "0 frames"),
        ((1, 5, 16, 16, 3), True, "5 frames.*multiple of 4"),
        ((1, 0, 16, 16, 3), True, "0 frames"),
    ],
)
def test_a_clip_off_the_grid_is_refused(model, shape, has_past, says):
    past = encode(model, CLIP)[2] if has_past else None
    with pytest.raises(UserError, match=says):
        model.encode_chunk(np.zeros(shape, np.float32), past)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2))}, "first.*2, 2, 2"),
        ({"encoder_widths": (4, 6)}, "encoder_widths.*3"),
        ({"decoder_blocks": (1, 1, 1, 1)}, "decoder_blocks.*3"),
    ],
)
def test_a_config_that_can_not_be_built_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(CONFIG, **change)


def test_the_transformers_latent_is_the_mean_at_unit_scale(model, latent):
    scaled = jax.jit(VAE.to_latent)(model, CLIP)
    np.testing.assert_allclose(
        scaled, (latent - np.array(CONFIG.latent_mean)) / np.array(CONFIG.latent_std), atol=1e-5
    )


def test_the_count_of_operations_is_the_compilers():
    config, clip = VAEConfig(), jax.ShapeDtypeStruct((2, 9, 128, 192, 3), jnp.float32)
    model = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    there_and_back = jax.jit(lambda model, clip: model.decode(model.encode(clip)[0]))
    counted = there_and_back.lower(model, clip).cost_analysis()["flops"]
    assert vae.reconstruction_flops(config, 2, 9, 128, 192) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("channels", [3, 96])
def test_one_frame_after_zeros_is_convolved_in_bfloat16_too(channels):
    """The first chunk of every stream: oneDNN read beyond it where XLA had made the zeros its padding."""
    x = RNG.normal(size=(1, 1, 32, 48, channels)).astype(np.float32)
    kernel = RNG.normal(size=(3, 3, 3, channels, 8)).astype(np.float32) / np.sqrt(27 * channels)
    padded = jax.jit(lambda x, kernel: conv.causal_conv(conv.ConvCache().extend(x, 2), kernel))
    for _ in range(3):  # it was other garbage each time
        got = padded(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)).astype(jnp.float32)
        np.testing.assert_allclose(got, padded(x, kernel), atol=0.03)
