"""Weight-only int8: what is rounded and how far, on both open transformers, below a LoRA, and in a scan's memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.diffusers_folder import golden
from helpers.parity import draw_all, relative_error
from ltx_check import run as run_ltx
from wan_check import run as run_wan
from wan_check import segment, sigmas

from sora_jax.checkpoints.store import named_leaves
from sora_jax.models.int8 import quantize, to_int8, weight_bytes
from sora_jax.models.layers import linear_layers
from sora_jax.models.low_rank import LoRAConfig, init_lora, with_lora
from sora_jax.models.ltx_weights import PUBLISHED_LTX, ltx_config
from sora_jax.models.wan import Wan
from sora_jax.models.wan_weights import PUBLISHED_WAN, published_shapes, wan_config
from sora_jax.tokens.packing import pack_batch

WAN, LTX = golden("wan_tiny"), golden("ltx_tiny")
CONFIG = wan_config(WAN["config"])


@pytest.fixture(scope="module")
def quantized() -> Wan:
    return PUBLISHED_WAN.load(CONFIG, draw_all(WAN["names"]), dtype=np.int8)


def restored(model):
    """The same model with float32 matrices of what its int8 ones stand for."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    for layer in linear_layers(copy).values():
        if hasattr(layer, "kernel_scale"):
            layer.kernel.set_value(
                layer.kernel[...].astype(jnp.float32) * layer.kernel_scale[...][..., None, :]
            )
            del layer.kernel_scale
    return copy


def make_batch():
    one = segment(WAN["latent"][0].transpose(1, 2, 3, 0), WAN["text"][0])
    batch, _ = pack_batch([[one]], 1, 32, 16, 4)
    return batch, sigmas(batch)


def test_a_number_is_off_by_half_a_step_of_its_column_at_most():
    matrix = np.random.default_rng(0).standard_normal((3, 40, 5), np.float32)
    matrix[1, :, 2] = 0
    kernel, scale = quantize(matrix)
    assert kernel.dtype == np.int8 and scale.shape == (3, 5) and scale[1, 2] == 0
    used = scale > 0
    np.testing.assert_array_equal(np.abs(kernel.astype(int)).max(1)[used], 127)
    off = np.abs(kernel * scale[:, None] - matrix)
    assert (off <= scale[:, None] * 0.5001).all() and off.max() > 0.4 * scale.max()


@pytest.mark.parametrize(
    ("published", "config", "kept", "run"),
    [(PUBLISHED_WAN, CONFIG, WAN, run_wan), (PUBLISHED_LTX, ltx_config(LTX["config"]), LTX, run_ltx)],
)
def test_matrices_of_the_blocks_are_int8_and_nothing_else_is(published, config, kept, run):
    weights = draw_all(kept["names"])
    model, whole = published.load(config, weights, dtype=np.int8), published.load(config, weights)
    leaves, originals = named_leaves(model), named_leaves(whole)
    for name, leaf in originals.items():
        if name.startswith("blocks/") and name.endswith("/kernel"):
            assert leaves[name].dtype == jnp.int8 and f"{name}_scale" in leaves
        else:
            np.testing.assert_array_equal(leaves[name], leaf)
    assert len(leaves) == len(originals) + 7  # scales
    again = named_leaves(to_int8(whole))
    jax.tree.map(np.testing.assert_array_equal, again, leaves)
    # What it computes is the product with those numbers, and near the original.
    got = run(model, kept)
    assert relative_error(got, run(restored(model), kept)) < 1e-5
    assert 1e-3 < relative_error(got, np.squeeze(kept["velocity"])) < 0.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_may_be_narrower(quantized, dtype):
    """Sums of x · 127 are more than float16 holds, and what they stand for isn't; forward and gradient."""
    stack = linear_layers(quantized)["blocks/down"]
    layer, exact = (
        jax.tree.map(lambda leaf: leaf[0], own)
        for own in (stack, linear_layers(restored(quantized))["blocks/down"])
    )
    x = 60 * jnp.sign(exact.kernel[...][:, 0])[None]
    total = lambda layer, x: layer(x).astype(jnp.float32).sum()
    got, want = (jax.value_and_grad(total, 1)(*given) for given in ((layer, x.astype(dtype)), (exact, x)))
    assert layer(x.astype(dtype)).dtype == dtype
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * float(np.abs(other).max()))


def test_a_lora_learns_on_it_as_on_the_numbers_that_it_stands_for(quantized):
    """An MLP's two matrices; test_finetune.py trains whole models."""
    config = LoRAConfig(rank=2, targets="^(up|down)$")
    first = lambda model: jax.tree.map(lambda leaf: leaf[0], model.blocks)
    lora = init_lora(first(quantized), config, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
    x = jax.random.normal(jax.random.key(2), (5, CONFIG.width))

    def loss(lora, base):
        block = with_lora(base, lora, config)
        return jnp.square(block.down(jax.nn.gelu(block.up(x)))).mean()

    bases = first(quantized), first(restored(quantized))
    got, want = (jax.tree.leaves(jax.jit(jax.grad(loss))(lora, base)) for base in bases)
    assert len(got) == 4
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()))


def test_no_float_copy_of_the_stack_is_made():
    """What a step takes beside its arguments doesn't grow with the layers."""
    batch, sigma = make_batch()
    taken = []
    for layers in (2, 12):
        config = dataclasses.replace(CONFIG, layers=layers, hidden=512)
        shapes = jax.eval_shape(lambda own=config: Wan(own, rngs=nnx.Rngs(0)))
        model = to_int8(jax.tree.map(lambda like: jnp.ones(like.shape), shapes))
        compiled = jax.jit(lambda m, b, s: m(b.patches, b, s)).lower(model, batch, sigma).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    assert taken[1] - taken[0] < 4 * 48 * 512  # one float32 matrix


def test_bytes_are_counted_as_they_are_kept(quantized):
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert weight_bytes(published_shapes(CONFIG), np.dtype(np.int8)) == own
    large = list(published_shapes(wan_config({})))
    assert weight_bytes(large, np.dtype(np.int8)) < 0.6 * weight_bytes(large, np.dtype(jnp.bfloat16))
