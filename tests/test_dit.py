"""The diffusion transformer: packed = alone, a σ per token, layers scanned, sizes, cost, and a golden step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_batch import wave

from sora_jax.data.packing import PackedBatch, Placement, Run, pack_rows, unpack
from sora_jax.data.patches import coordinates
from sora_jax.diffusion import flow
from sora_jax.errors import UserError
from sora_jax.models.dit import SIZES, DiT, DiTConfig, _pool, forward_flops
from sora_jax.train.optim import OptimConfig, make_optimizer

CONFIG = DiTConfig(
    size="",
    width=32,
    layers=2,
    heads=2,
    mlp_ratio=2,
    channels=2,
    text_width=6,
    dtype="float32",
    attention="reference",
)
N, M, K = 16, 6, 3
#        latent grid, words, given tokens
SHAPES = [((3, 4, 4), 3, 4), ((1, 4, 4), 4, 0), ((1, 4, 6), 0, 0), ((2, 2, 2), 2, 1), ((1, 2, 2), 1, 0)]
SIGMAS = (0.9, 0.2, 0.55, 0.4, 0.7)


def make_runs() -> list[Run]:
    runs = []
    for i, (grid, words, given) in enumerate(SHAPES):
        coords = coordinates(grid, CONFIG.patch, fps=8.0)
        n = len(coords)
        runs.append(
            Run(
                patches=wave(n, CONFIG.patch_width, pitch=1 + 0.1 * i),
                coords=coords,
                start=(np.arange(n) >= given).astype(np.float32),
                words_time=np.zeros(n, np.float32),
                text=wave(words, CONFIG.text_width, pitch=2 + 0.1 * i),
                text_time=np.arange(words, dtype=np.float32) / 2,
                hints=wave(n, 2 * (CONFIG.patch_width + 1), pitch=3 + 0.1 * i),
            )
        )
    return runs


def make_dit(config: DiTConfig = CONFIG) -> DiT:
    """A model in which no parameter is zero, so that every layer matters."""
    shapes = jax.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def velocity(model: DiT, batch: PackedBatch, sigma: Any) -> jax.Array:
    return model(batch.patches, batch, sigma)


def sigma_table(sigmas: Sequence[float], placements: Sequence[Placement], batch: PackedBatch) -> np.ndarray:
    """Every entry of a run has the run's level; those that belong to none have one that must not matter."""
    table = np.full(batch.condition_runs.shape, 0.33, np.float32)
    table[:, 0] = 0
    for sigma, place in zip(sigmas, placements, strict=True):
        table[place.row, batch.condition_runs[place.row] == place.segment] = sigma
    return table


def pulled_sum(
    model: DiT, batch: PackedBatch, sigma: Any, weights: Any
) -> tuple[jax.Array, tuple[DiT, jax.Array]]:
    """The velocity, and the gradient of Σ weights · velocity in the parameters and in the patches."""

    def weighed(model: DiT, patches: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = velocity(model, dataclasses.replace(batch, patches=patches), sigma)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True)(model, batch.patches)
    return out, gradients


forward, forward_backward = jax.jit(velocity), jax.jit(pulled_sum)
RUNS = make_runs()
BATCH, PLACES = pack_rows(RUNS, N, M, K)
TABLE = sigma_table(SIGMAS, PLACES, BATCH)


@pytest.fixture(
    scope="module", params=[{}, {"absolute": True, "pooled_text": True, "hints": True}], ids=["plain", "all"]
)
def model(request) -> DiT:
    return make_dit(dataclasses.replace(CONFIG, **request.param))


@pytest.fixture(scope="module")
def outputs(model) -> list[np.ndarray]:
    """Each run's velocity in the packed batch."""
    return unpack(forward(model, BATCH, TABLE), PLACES)


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Pytrees whose arrays differ by no more than `tolerance` of their largest number."""
    for path, a in jax.tree.leaves_with_path(ours):
        b = dict(jax.tree.leaves_with_path(theirs))[path]
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_the_batch_has_what_this_file_is_about():
    runs_a_row = [len({place.segment for place in PLACES if place.row == row}) for row in range(2)]
    assert runs_a_row == [3, 2]
    assert (BATCH.segment_ids == 0).any()
    assert (BATCH.text_segment_ids == 0).any()


@pytest.mark.parametrize("i", range(len(RUNS)))
def test_packed_equals_alone(model, i):
    """A run among others gives the same velocity and gradients as in a row of its own."""
    place, weights = PLACES[i], np.zeros((2, N, CONFIG.patch_width), np.float32)
    weights[place.row, place.start : place.start + place.length] = wave(
        place.length, CONFIG.patch_width, pitch=3
    )
    packed, (in_parameters, in_patches) = forward_backward(model, BATCH, TABLE, weights)

    batch, (own,) = pack_rows([RUNS[i]], N, M, K)
    own_weights = np.zeros((1, N, CONFIG.patch_width), np.float32)
    own_weights[0, : own.length] = wave(own.length, CONFIG.patch_width, pitch=3)
    table = sigma_table([SIGMAS[i]], [own], batch)
    alone, (alone_in_parameters, alone_in_patches) = forward_backward(model, batch, table, own_weights)

    (packed_run,), (alone_run,) = unpack(packed, [place]), unpack(alone, [own])
    assert np.abs(alone_run).max() > 0.1
    close(packed_run, alone_run)
    close(in_parameters, alone_in_parameters)
    close(unpack(in_patches, [place]), unpack(alone_in_patches, [own]))
    others = np.array(in_patches)
    others[place.row, place.start : place.start + place.length] = 0
    assert not others.any(), "another run's or an empty slot's patches have a part in this run's velocity"


def test_a_row_without_empty_slots_and_without_words_gives_the_same(model, outputs):
    i = next(i for i, run in enumerate(RUNS) if not len(run.text))
    batch, (own,) = pack_rows([RUNS[i]], len(RUNS[i].patches), 0, K)
    close(unpack(forward(model, batch, sigma_table([SIGMAS[i]], [own], batch)), [own]), [outputs[i]])


def test_neither_the_order_of_rows_nor_of_slots_nor_of_ids_nor_of_the_table_matters(model):
    out = np.asarray(forward(model, BATCH, TABLE))
    renamed, order = np.array([0, 3, 1, 2]), np.random.default_rng(0).permutation
    slots, words, rows, entries = order(N), order(M), np.array([1, 0]), np.array([0, 2, 3, 1])
    places = np.argsort(entries).astype(np.int32)  # where an entry of the table has gone
    told = {
        "ids": ("segment_ids", "text_segment_ids", "condition_runs"),
        "entries": ("condition_ids", "text_condition_ids"),
    }

    def shuffle(name: str) -> np.ndarray:
        own = entries if name in ("condition_runs", "condition_time", "condition_start") else slots
        array = np.asarray(getattr(BATCH, name))[rows][:, words if name.startswith("text") else own]
        array = renamed[array].astype(np.int32) if name in told["ids"] else array
        return places[array] if name in told["entries"] else array

    batch = PackedBatch(**{field.name: shuffle(field.name) for field in dataclasses.fields(PackedBatch)})
    real = batch.segment_ids > 0
    close(np.asarray(forward(model, batch, TABLE[rows][:, entries]))[real], out[rows][:, slots][real])


def test_a_runs_velocity_depends_on_its_own_noise_level_alone(model, outputs):
    for i in range(len(RUNS)):
        sigmas = list(SIGMAS)
        sigmas[i] -= 0.15
        changed = unpack(forward(model, BATCH, sigma_table(sigmas, PLACES, BATCH)), PLACES)
        for j in range(len(RUNS)):
            if i == j:
                assert np.abs(changed[j] - outputs[j]).max() > 1e-2
            else:
                np.testing.assert_array_equal(changed[j], outputs[j])


def test_a_runs_velocity_depends_on_its_own_words_alone_and_on_when_they_hold(model, outputs):
    place = PLACES[0]
    mine = (BATCH.text_segment_ids == place.segment) & (np.arange(2) == place.row)[:, None]
    for change in (
        {"text": np.where(mine[..., None], -BATCH.text, BATCH.text)},
        {"text_time": np.where(mine, BATCH.text_time + 1, BATCH.text_time)},
    ) + (
        # Other words are in force.
        (
            {
                "condition_time": np.where(BATCH.condition_runs == place.segment, 0.5, 0.0)
                * (np.arange(2) == place.row)[:, None]
            },
        )
        if model.config.pooled_text
        else ()
    ):
        changed = unpack(forward(model, dataclasses.replace(BATCH, **change), TABLE), PLACES)
        assert np.abs(changed[0] - outputs[0]).max() > 1e-3, f"{list(change)} does not matter"
        for ours, theirs in zip(changed[1:], outputs[1:], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def all_given(i: int) -> PackedBatch:
    """The batch with every token of run i given; its words keep the run's level."""
    start, entries, place = np.array(BATCH.start), np.array(BATCH.condition_ids), PLACES[i]
    own = np.s_[place.row, place.start : place.start + place.length]
    start[own] = entries[own] = 0
    return dataclasses.replace(BATCH, start=start, condition_ids=entries)


def run_at(model: DiT, batch: PackedBatch, i: int, sigma: float) -> np.ndarray:
    """The velocity of run i at the noise level `sigma`."""
    table = sigma_table([*SIGMAS[:i], sigma, *SIGMAS[i + 1 :]], PLACES, batch)
    return unpack(forward(model, batch, table), PLACES)[i]


def test_given_tokens_have_noise_level_zero(model):
    """A run that is all given and has no words looks the same at any σ: as one at σ = 0 that is not given."""
    i = next(i for i, run in enumerate(RUNS) if not len(run.text))
    given = all_given(i)
    np.testing.assert_array_equal(run_at(model, given, i, 0.3), run_at(model, given, i, 0.8))
    close(run_at(model, given, i, 0.3), run_at(model, BATCH, i, 0.0), 1e-6)
    assert np.abs(run_at(model, BATCH, i, 0.3) - run_at(model, BATCH, i, 0.0)).max() > 1e-2


def test_words_share_their_runs_noise_level(model):
    """Of a run that is all given, the words alone know σ."""
    i = next(i for i, run in enumerate(RUNS) if len(run.text))
    given = all_given(i)
    assert np.abs(run_at(model, given, i, 0.3) - run_at(model, given, i, 0.8)).max() > 1e-3


def test_the_parts_of_a_run_have_levels_of_their_own(model, outputs):
    """Two entries of one run at the same level are as one; at another level, tokens that hold it change."""
    i, extra = 0, np.s_[PLACES[0].row, :]
    wide = lambda table, value: np.pad(table, ((0, 0), (0, 1)), constant_values=value)
    place = PLACES[i]
    half = np.s_[place.row, place.start + place.length // 2 : place.start + place.length]
    entries = np.array(BATCH.condition_ids)
    own = entries[half][0]
    entries[half] = K + 1
    runs, times, starts = (
        wide(table, 0) for table in (BATCH.condition_runs, BATCH.condition_time, BATCH.condition_start)
    )
    for table in (runs, times, starts):
        table[extra][K + 1] = table[extra][own]
    batch = dataclasses.replace(
        BATCH, condition_ids=entries, condition_runs=runs, condition_time=times, condition_start=starts
    )
    table = wide(TABLE, 0.1)
    table[place.row, K + 1] = table[place.row, own]
    for ours, theirs in zip(unpack(forward(model, batch, table), PLACES), outputs, strict=True):
        close(ours, theirs)
    table[place.row, K + 1] -= 0.4
    changed = unpack(forward(model, batch, table), PLACES)
    assert np.abs(changed[i][place.length // 2 :] - outputs[i][place.length // 2 :]).max() > 1e-2
    for ours, theirs in zip(changed[1:], outputs[1:], strict=True):
        close(ours, theirs)


def test_the_words_in_force_are_what_is_pooled():
    """Two shots in one run: each token's condition has its own shot's words, and words beyond count nowhere."""
    run = dataclasses.replace(
        RUNS[0],
        text_time=np.array([0, 0, 1], np.float32),
        words_time=np.repeat([0, 1, 1], 4).astype(np.float32),
    )
    batch, (place,) = pack_rows([run], N, M, K)
    pooled = np.asarray(_pool(jnp.asarray(batch.text), batch))
    entries = batch.condition_ids[0, : place.length]
    painted = run.start > 0
    wanted = np.where(run.words_time[:, None] == 0, run.text[:2].mean(0), run.text[2])
    np.testing.assert_allclose(pooled[0, entries[painted]], wanted[painted], rtol=1e-6)
    assert not pooled[0, 0].any()


def test_a_run_may_begin_anywhere_in_time_and_space(model):
    """Rotary embedding sees differences alone: true of video by itself; words stand at the origin."""
    model = make_dit(dataclasses.replace(model.config, absolute=False))  # absolute ones say where it begins
    outputs = unpack(forward(model, BATCH, TABLE), PLACES)
    i = next(i for i, run in enumerate(RUNS) if not len(run.text))
    moved = dataclasses.replace(BATCH, coords=BATCH.coords + np.array([8.0, -1.0, 0.5, 0.0, 0.0], np.float32))
    close(unpack(forward(model, moved, TABLE), PLACES)[i], outputs[i], 1e-4)


def test_what_a_token_covers_is_told_where_places_are(model, outputs):
    wider = dataclasses.replace(BATCH, coords=BATCH.coords * np.array([1, 1, 1, 2, 2], np.float32))
    changed = unpack(forward(model, wider, TABLE), PLACES)
    for ours, theirs in zip(changed, outputs, strict=True):
        assert (np.abs(ours - theirs).max() > 1e-2) == model.config.absolute


def unrolled(body: Callable, carry: Any, layers: Any) -> tuple[Any, None]:
    for i in range(len(jax.tree.leaves(layers)[0])):
        carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], layers))
    return carry, None


@pytest.mark.parametrize("how", ["unrolled", "dots", "none"])
def test_scanning_and_recomputing_change_no_number(model, how, monkeypatch):
    weights = wave(2, N, CONFIG.patch_width)
    expected = forward_backward(model, BATCH, TABLE, weights)
    if how == "unrolled":
        monkeypatch.setattr(jax.lax, "scan", unrolled)
        # A new function: jit remembers the trace of the old one.
        got = jax.jit(lambda *arguments: pulled_sum(*arguments))(model, BATCH, TABLE, weights)
    else:
        other = make_dit(dataclasses.replace(model.config, remat=how))
        got = forward_backward(other, BATCH, TABLE, weights)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        close(ours, theirs)


def test_a_deep_transformer_is_compiled_as_a_shallow_one_is():
    def program(layers: int) -> str:
        model = jax.eval_shape(lambda: DiT(dataclasses.replace(CONFIG, layers=layers), rngs=nnx.Rngs(0)))
        return (
            jax.jit(jax.grad(lambda model: model(BATCH.patches, BATCH, TABLE).sum())).lower(model).as_text()
        )

    assert len(program(40)) < 1.02 * len(program(4))


def test_at_the_beginning_blocks_are_the_identity_and_the_velocity_is_zero():
    model = jax.jit(lambda key: DiT(CONFIG, rngs=nnx.Rngs(params=key)))(jax.random.key(0))
    assert not np.asarray(forward(model, BATCH, TABLE)).any()
    # With a last layer that is not zero, layers that do nothing give what other layers that do nothing give.
    model.patch_out.kernel[...] = wave(*model.patch_out.kernel.shape)
    out = np.asarray(forward(model, BATCH, TABLE))
    assert np.abs(out).max() > 1
    for name in ("qkv", "out", "up", "down"):
        kernel = getattr(model.blocks, name).kernel
        kernel[...] = 2 * kernel[...]
    np.testing.assert_array_equal(forward(model, BATCH, TABLE), out)


def test_bfloat16_is_near_float32_and_the_velocity_is_float32(model, outputs):
    half = forward(make_dit(dataclasses.replace(model.config, dtype="bfloat16")), BATCH, TABLE)
    assert half.dtype == jnp.float32
    for ours, theirs in zip(unpack(half, PLACES), outputs, strict=True):
        close(ours, theirs, 0.1)
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


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
        start=like(tokens),
        condition_ids=like(tokens, dtype=jnp.int32),
        text=like(0, config.text_width),
        text_segment_ids=like(0, dtype=jnp.int32),
        text_time=like(0),
        text_condition_ids=like(0, dtype=jnp.int32),
        condition_runs=like(2, dtype=jnp.int32),
        condition_time=like(2),
        condition_start=like(2),
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
    counts = ((BATCH.segment_ids > 0) & ~BATCH.given)[..., None]

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
        "step alone to the optimizer. If you meant to change what is learned, run `python tests/test_dit.py`, put "
        "what it prints into GOLDEN, and say in the commit message why it moved."
    )


if __name__ == "__main__":
    print({name: round(number, 6) for name, number in golden_step().items()})
