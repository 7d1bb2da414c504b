"""First-block caching: nothing changes where it may not act; where it acts, the later layers' part is the old one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.diffusers_folder import golden
from helpers.parity import draw_all
from helpers.sampling import tabulate
from helpers.tiny_batch import BATCH, CONFIG, NOISE, PLACES, SETTINGS, SIGMAS, K, M, N, make_segment, wave

from sora_jax.diffusion.guidance import Guidance
from sora_jax.diffusion.solvers import ODE_SOLVERS, State, solver_step
from sora_jax.models.dit import DiT
from sora_jax.models.ltx import LTX
from sora_jax.models.ltx_weights import PUBLISHED_LTX, ltx_config
from sora_jax.models.step_cache import StepCache
from sora_jax.models.wan import Wan
from sora_jax.models.wan_weights import PUBLISHED_WAN, wan_config
from sora_jax.pipeline.batching import BatchShape, ContinuousBatcher
from sora_jax.tokens.packing import PackedBatch

DEEP = dataclasses.replace(CONFIG, layers=3)
TINY, HUGE = 1e-12, 1e12  # thresholds that no change is below, and that every change is


def make_deep() -> DiT:
    shapes = jax.eval_shape(lambda: DiT(DEEP, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: wave(*x.shape) / np.sqrt(x.shape[-2] if x.ndim > 1 else 4), shapes)


def make_wan() -> Wan:
    file = golden("wan_tiny")
    return PUBLISHED_WAN.load(wan_config(file["config"]), draw_all(file["names"]))


def make_ltx() -> LTX:
    file = golden("ltx_tiny")
    return PUBLISHED_LTX.load(ltx_config(file["config"]), draw_all(file["names"]))


def batch_of(config) -> PackedBatch:
    """The batch with patches and words as wide as a transformer has them."""
    patches = wave(*BATCH.patches.shape[:2], config.patch_width)
    text = wave(*BATCH.text.shape[:2], config.text_width, pitch=2)
    return dataclasses.replace(BATCH, patches=patches, text=text, reference=None)


@pytest.fixture(scope="module", params=[make_deep, make_wan, make_ltx], ids=["dit", "wan", "ltx"])
def model(request):
    return request.param()


@jax.jit
def call(model, patches, batch, sigma, cache=None):
    return model(patches, batch, sigma, cache=cache)


def begin(config, threshold: float) -> StepCache:
    return StepCache.begin(config, *BATCH.patches.shape[:2], BATCH.text.shape[1], threshold)


def test_what_is_not_skipped_is_the_same_and_what_is_has_the_old_later_layers(model):
    batch = batch_of(model.config)
    nearly = batch.patches + 1e-3 * wave(*batch.patches.shape, pitch=5)
    expected, moved = (call(model, patches, batch, SIGMAS[0]) for patches in (batch.patches, nearly))
    got, cache = call(model, batch.patches, batch, SIGMAS[0], begin(model.config, TINY))
    np.testing.assert_allclose(got, expected, atol=2e-5)
    got, cache = call(model, nearly, batch, SIGMAS[0], cache)
    np.testing.assert_allclose(got, moved, atol=2e-5)
    assert int(cache.skipped) == 0

    _, cache = call(model, batch.patches, batch, SIGMAS[0], begin(model.config, HUGE))
    assert int(cache.skipped) == 0, "there is nothing to take from before"
    again, cache = call(model, batch.patches, batch, SIGMAS[0], cache)
    np.testing.assert_allclose(again, expected, atol=2e-5)
    got, kept = call(model, nearly, batch, SIGMAS[0], cache)
    assert int(kept.skipped) == 2
    for name in ("first", "rest"):  # of the last whole evaluation
        np.testing.assert_array_equal(getattr(kept, name), getattr(cache, name))
    real = np.asarray(batch.segment_ids) > 0
    change = np.abs(np.asarray(got - expected))[real].max()
    assert change > 0 and np.abs(np.asarray(got - moved))[real].max() > 0


def test_one_segment_that_changes_is_enough():
    """The largest of the segments' own changes decides; padding has no say, whatever is in it."""
    model = make_deep()
    batch, (longest, *_) = batch_of(DEEP), sorted(PLACES, key=lambda place: -place.length)
    shortest = min(PLACES, key=lambda place: place.length)
    _, cache = call(model, batch.patches, batch, SIGMAS[0], begin(DEEP, 0.05))

    def skipped(where: tuple, size: float) -> bool:
        patches = batch.patches.copy()
        patches[where] += size * wave(*patches[where].shape, pitch=7)
        return bool(call(model, patches, batch, SIGMAS[0], cache)[1].skipped)

    own = np.s_[shortest.row, shortest.start : shortest.start + shortest.length]
    assert shortest.length < longest.length
    assert not skipped(own, 10.0)
    assert skipped(own, 1e-4)
    padding = np.nonzero(np.asarray(batch.segment_ids) == 0)
    assert len(padding[0]) and skipped(padding, 1e6)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_every_solver_steps_with_a_cache(solver):
    model, tables = make_deep(), tabulate(SETTINGS, PLACES, BATCH.condition_segment_ids)
    states = []
    for cache in (None, StepCache.begin(DEEP, 3 * len(NOISE), N, M, TINY)):
        state = State.begin(jnp.asarray(NOISE), jnp.asarray(SIGMAS[0]), cache)
        for now, then in itertools.pairwise(SIGMAS[:3]):
            state = solver_step(model, state, BATCH, now, then, tables, None, solver, 3)
        states.append(state)
    plain, cached = states
    assert plain.cache is None and int(cached.cache.skipped) == 0
    np.testing.assert_allclose(plain.x, cached.x, atol=2e-4)


def test_a_batch_skips_many_small_steps_and_begins_again_where_a_segment_joins():
    model = make_deep()
    shape = BatchShape(batch_size=1, seq_len=N, text_len=M, max_segments=K, max_conditions=4)
    segment = make_segment(1, (1, 4, 6), 2, (1.0,))
    asked = {
        "segment": segment,
        "noise": wave(len(segment.patches), DEEP.patch_width, pitch=3),
        "sigmas": np.linspace(1, 0, 41),
        "guidance": Guidance(text=2.0),
    }

    def run(threshold: float, joins_at: int = -1) -> tuple[np.ndarray, list[int]]:
        batcher, out, counts = ContinuousBatcher(model, [shape], "euler", threshold), {}, []
        first = batcher.add(**asked)
        while batcher.busy:
            if len(counts) == joins_at:
                batcher.add(**asked | {"sigmas": np.linspace(1, 0, 3)})
            out |= batcher.step()
            counts.append(int(batcher._state.cache.skipped) if threshold else 0)
        return out[first], counts

    whole, _ = run(0.0)
    near, counts = run(0.1)
    assert 5 < counts[-1] < 40
    far, more = run(0.4)
    assert more[-1] > counts[-1]
    error = lambda x: np.abs(x - whole).mean() / np.abs(whole).mean()
    assert 0 < error(near) < 0.03 and error(near) < error(far)
    _, joined = run(0.2, joins_at=20)
    assert joined[20] == 0 and joined[19] > 0, "no segment goes on from another batch's layers"
