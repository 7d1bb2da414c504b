"""The transformer's sizes, what compiling it takes, the count of its operations, and a golden training step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.tiny_batch import wave
from helpers.tiny_dit import BATCH, CONFIG, TABLE, make_dit, unrolled, velocity

from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import SIZES, DiTConfig, forward_flops
from sora_jax.tokens.packing import PackedBatch
from sora_jax.train.optim import OptimConfig, make_optimizer


def test_a_deep_transformer_is_compiled_as_a_shallow_one_is():
    def program(layers: int) -> str:
        model = jax.eval_shape(lambda: DiT(dataclasses.replace(CONFIG, layers=layers), rngs=nnx.Rngs(0)))
        return (
            jax.jit(jax.grad(lambda model: model(BATCH.patches, BATCH, TABLE).sum())).lower(model).as_text()
        )

    assert len(program(40)) < 1.02 * len(program(4))


def count_parameters(config: DiTConfig) -> int:
    model = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(model))


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_the_papers(size, millions):
    """Peebles and Xie 2022, table 1, at patch 2 of 4 channels; ours reads words where theirs embeds labels."""
    config = DiTConfig(size=size, channels=4)
    assert count_parameters(config) / 1e6 == pytest.approx(millions, rel=0.03)
    assert (config.width, config.layers, config.heads) == SIZES[size]


def test_the_largest_of_the_paper_is_28_layers_of_16_heads():
    config = DiTConfig(size="XL")
    assert (config.width, config.layers, config.heads) == (1152, 28, 16)


@pytest.mark.parametrize("size", [size for size in SIZES if size.endswith("B") and size != "B"])
def test_sizes_named_after_their_parameters_have_about_as_many(size):
    assert count_parameters(DiTConfig(size=size)) / 1e9 == pytest.approx(float(size[:-1]), rel=0.2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": "XXL"}, "'XXL'.*XL"),
        ({"size": "S", "width": 64}, "dit.width.*dit.size='S'"),
        ({"width": 30, "heads": 4}, "heads=4.*width=30"),
        ({"width": 14, "heads": 2}, "heads=2.*width=14.*even"),
        ({"width": 8, "heads": 2}, "heads=2.*width=8.*6 or more"),
        ({"width": 0}, "width=0"),
        ({"heads": 0}, "heads=0"),
        ({"layers": 0}, "layers=0"),
        ({"remat": "some"}, "'some'.*dots"),
        ({"attention": "flash"}, "'flash'.*reference"),
        ({"coords": "polar"}, "'polar'.*fractional"),
        ({"sequence": "tree"}, "'tree'.*heads, ring"),
    ],
)
def test_a_config_that_can_not_be_built_is_refused(change, says):
    own = {"size": "", "width": 32, "layers": 2, "heads": 2}
    with pytest.raises(UserError, match=says):
        DiTConfig(**({} if "size" in change else own) | change)


@pytest.mark.parametrize("tokens", [128, 1024])
def test_the_count_of_operations_is_the_compilers(tokens, monkeypatch):
    """One run a row, so that nothing is masked. The compiler counts a scan's body once: here it is unrolled."""
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    config = DiTConfig(size="", width=256, layers=2, heads=4, dtype="float32", attention="reference")
    model = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((1, *shape), dtype)
    batch = PackedBatch(
        patches=like(tokens, config.patch_width),
        coords=like(tokens, 5),
        segment_ids=like(tokens, dtype=jnp.int32),
        init_sigma=like(tokens),
        condition_ids=like(tokens, dtype=jnp.int32),
        text=like(0, config.text_width),
        text_segment_ids=like(0, dtype=jnp.int32),
        text_time=like(0),
        text_condition_ids=like(0, dtype=jnp.int32),
        condition_segment_ids=like(2, dtype=jnp.int32),
        condition_caption_time=like(2),
        condition_init_sigma=like(2),
    )
    lowered = jax.jit(lambda *arguments: velocity(*arguments)).lower(model, batch, like(2))
    counted = lowered.cost_analysis()["flops"]
    assert forward_flops(config, tokens, tokens**2) == pytest.approx(counted, rel=0.15)


GOLDEN = {"loss": 2.078485, "gradient norm": 3.03398, "loss after the step": 1.958895}


def golden_step() -> dict[str, float]:
    """One AdamW step on one packed batch, from numbers that no random generator has a part in."""
    model, config = make_dit(), OptimConfig(lr=1e-3, warmup=1, schedule="constant", clip_norm=1.0)
    model = jax.tree.map(lambda x: 0.1 * wave(*x.shape), model)
    optimizer = make_optimizer(config, model)
    sigma = np.take_along_axis(TABLE, BATCH.condition_ids, axis=1)[..., None]
    noise = wave(*BATCH.patches.shape, pitch=5)
    noisy = dataclasses.replace(BATCH, patches=flow.interpolate(BATCH.patches, noise, sigma))
    counts = ((BATCH.segment_ids > 0) & ~BATCH.conditioning_mask)[..., None]

    def loss(model: DiT) -> jax.Array:
        error = velocity(model, noisy, TABLE) - flow.velocity(BATCH.patches, noise)
        return jnp.mean(jnp.square(error), where=counts)

    @jax.jit
    def step(model: DiT) -> tuple[jax.Array, jax.Array, jax.Array]:
        before, gradient = jax.value_and_grad(loss)(model)
        updates, _ = optimizer.update(gradient, optimizer.init(model), model)
        return before, optax.tree.norm(gradient), loss(optax.apply_updates(model, updates))

    return dict(zip(GOLDEN, map(float, step(model)), strict=True))


def test_the_golden_training_step():
    got = golden_step()
    assert got == pytest.approx(GOLDEN, rel=1e-4), (
        f"The golden step gives {got}, and gave {GOLDEN}. Packing, the flow's path, the transformer's arithmetic and "
        "AdamW have a part in it; random numbers, initialisation, sharding and speed have none. So if you meant to "
        "make code clearer or faster, or moved to another JAX, this is a bug: a new loss points to packing, flow or "
        "the forward pass, a new norm alone to a gradient (attention, remat, a custom rule), a new loss after the "
        "step alone to the optimizer. If you meant to change what is learned, run "
        "`python tests/models/test_dit_config.py`, put what it prints into GOLDEN, and say in the commit message why "
        "it moved."
    )


if __name__ == "__main__":
    print({name: round(number, 6) for name, number in golden_step().items()})
