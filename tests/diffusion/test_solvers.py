"""The solver loop: what is given stays, what rests stays, segments don't see one another, and errors fall in order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sampling import sample, tabulate
from helpers.tiny_batch import (
    BATCH,
    MAX_STEPS,
    NOISE,
    PLACES,
    SEGMENTS,
    SETTINGS,
    SIGMAS,
    STEPS,
    make_dit,
    make_noise,
    make_sigmas,
    pack,
    wave,
)

from sora_jax.diffusion import flow
from sora_jax.diffusion.guidance import Guidance
from sora_jax.diffusion.solvers import ODE_SOLVERS, State, solver_step
from sora_jax.tokens.packing import PackedBatch, unpack

MODEL = make_dit()
GUIDANCE = tabulate(SETTINGS, PLACES, BATCH.condition_segment_ids)


@pytest.fixture(scope="module", params=ODE_SOLVERS)
def solver(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def filled(solver) -> np.ndarray:
    return np.asarray(sample(MODEL, BATCH, NOISE, SIGMAS, GUIDANCE, solver))


def test_the_batch_has_what_this_file_is_about():
    assert BATCH.conditioning_mask.any()
    assert (BATCH.segment_ids == 0).any()
    assert len({place.row for place in PLACES}) == 2
    assert np.unique(BATCH.init_sigma).tolist() == [0, 0.5, np.float32(0.7), 1]
    assert GUIDANCE.passes() == 3


def test_what_is_not_generated_stays_bit_for_bit_and_the_rest_is_generated(filled):
    generated = BATCH.init_sigma > 0
    np.testing.assert_array_equal(filled[~generated], BATCH.patches[~generated])
    assert np.isfinite(filled).all()
    assert np.abs(filled - BATCH.patches)[generated].max(-1).min() > 1e-2


def fill_alone(i: int, solver: str, as_often: bool) -> np.ndarray:
    """Segment i in sequences of its own, the model asked as often as for all of them, or as it needs."""
    batch, (own,) = pack([SEGMENTS[i]])
    guidance = tabulate([SETTINGS[i]], [own], batch.condition_segment_ids)
    guidance.conditioning[:, 0] = (
        2.0 if as_often else 1.0
    )  # of conditioning tokens: weighs nothing, but asks for a third pass
    sigmas = make_sigmas(batch, [own], [STEPS[i]], MAX_STEPS)
    return unpack(sample(MODEL, batch, make_noise([own], [i]), sigmas, guidance, solver), [own])[0]


def test_a_segment_alone_is_what_it_is_among_others(solver, filled):
    for i, expected in enumerate(unpack(filled, PLACES)):
        np.testing.assert_allclose(fill_alone(i, solver, True), expected, atol=1e-4, err_msg=f"run {i}")


def test_passes_that_only_neighbours_need_change_nothing(solver, filled):
    if solver == "euler":
        for i in (1, 3):  # two passes, and one
            expected = unpack(filled, PLACES)[i]
            np.testing.assert_allclose(fill_alone(i, solver, False), expected, atol=1e-4, err_msg=f"run {i}")


def test_tokens_wait_where_they_start(solver):
    """Segment 2 has sigmas 1 and 0.5: until it has come down to the lower one, tokens of that are as they were put."""
    row, condition = next(zip(*np.nonzero(BATCH.condition_init_sigma == 0.5), strict=True))
    resting = int(np.argmax(SIGMAS[:, row, condition] < 0.5)) - 1
    assert resting >= 1
    early = np.asarray(sample(MODEL, BATCH, NOISE, SIGMAS[: resting + 1], GUIDANCE, solver))
    waiting = (BATCH.condition_ids == condition) & (np.arange(len(BATCH.patches)) == row)[:, None]
    begun = np.asarray(sample(MODEL, BATCH, NOISE, SIGMAS[:1], GUIDANCE, solver))
    np.testing.assert_array_equal(early[waiting], begun[waiting])
    np.testing.assert_allclose(begun[waiting], (0.5 * BATCH.patches + 0.5 * NOISE)[waiting], rtol=1e-6)
    others = (BATCH.init_sigma == 1) & (np.arange(len(BATCH.patches)) == row)[:, None]
    assert np.abs(early - begun)[others].max(-1).min() > 1e-3


def test_a_segment_that_is_done_rests(solver, filled):
    longer = np.concatenate([SIGMAS, np.zeros_like(SIGMAS[:2])])
    np.testing.assert_array_equal(sample(MODEL, BATCH, NOISE, longer, GUIDANCE, solver), filled)


def test_new_noise_takes_the_place_of_the_old():
    """With a model that always predicts the same x₀, a step's result is that and the step's own noise."""
    clean, fresh = wave(*NOISE.shape, pitch=9), wave(*NOISE.shape, pitch=11)
    at = lambda sigmas, batch: flow.gather_sigmas(sigmas, batch.condition_ids)[..., None]
    knows = lambda x, batch, sigma: (x - clean) / jnp.maximum(at(sigma, batch), 1e-6)
    state = State.begin(jnp.asarray(NOISE), SIGMAS[0])
    given = knows, state, BATCH, SIGMAS[0], SIGMAS[1], Guidance().tables(SIGMAS[0].shape), None
    after = jax.jit(lambda noise: solver_step.__wrapped__(*given, "sde", 1, noise))(fresh).x
    sigma, then = at(SIGMAS[0], BATCH), at(SIGMAS[1], BATCH)
    expected = np.where(then < sigma, (1 - then) * clean + then * fresh, NOISE)
    assert (then < sigma).any() and (then >= sigma).any()
    np.testing.assert_allclose(after, expected, atol=1e-5)


def test_a_step_above_hold_is_left_out():
    """Zero-init: the segment is as noisy as before when the next step begins."""
    place = PLACES[1]
    assert SIGMAS[0, place.row, BATCH.condition_ids[place.row, place.start]] > SETTINGS[1].zero_init_sigma
    after_one = sample(MODEL, BATCH, NOISE, SIGMAS[:2], GUIDANCE)
    (segment,), (noise,) = unpack(after_one, [place]), unpack(NOISE, [place])
    np.testing.assert_array_equal(segment, noise)
    after_two = sample(MODEL, BATCH, NOISE, SIGMAS[:3], GUIDANCE)
    assert np.abs(unpack(after_two, [place])[0] - noise).max() > 1e-2


def test_one_compilation_serves_every_mix_of_starts_settings_and_steps():
    solver_step.clear_cache()
    sample(MODEL, BATCH, NOISE, SIGMAS, GUIDANCE)
    batch, places = pack(
        [
            dataclasses.replace(segment, init_sigma=np.full_like(segment.init_sigma, 0.8))
            for segment in SEGMENTS
        ]
    )
    sigmas = make_sigmas(batch, places, STEPS[::-1], 9)
    other = tabulate(
        [Guidance(conditioning=3.0, high=0.6), *SETTINGS[1:]], places, batch.condition_segment_ids
    )
    sample(MODEL, batch, NOISE, sigmas, other)
    assert solver_step._cache_size() == 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The exact velocity of data that are normal, each number for itself."""

    mean: float
    deviation: float

    def __call__(self, x: jax.Array, batch: PackedBatch, sigma_bs: jax.Array) -> jax.Array:
        sigma = flow.gather_sigmas(sigma_bs, batch.condition_ids)[..., None]
        alpha, variance = 1 - sigma, self.deviation**2
        share = alpha * variance / (alpha**2 * variance + sigma**2)
        clean = self.mean + share * (x - alpha * self.mean)
        # dx/dσ = (x − x₀) / σ, where that has a limit at σ = 0.
        return jnp.where(sigma > 0, (x - clean) / jnp.maximum(sigma, 1e-6), -x)

    def solution(self, x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """Where the path that is at x at level σ ends: deviations from the mean keep their place in the spread."""
        spread = np.sqrt((1 - sigma) ** 2 * self.deviation**2 + sigma**2)
        return self.mean + self.deviation * (x - (1 - sigma) * self.mean) / spread


def _errors(solver: str, counts: tuple[int, ...]) -> dict[float, np.ndarray]:
    """Root mean square error of segments of so many steps, for tokens that start at 1 and at 0.7."""
    gaussian, start = Gaussian(0.8, 0.5), BATCH.init_sigma[..., None]
    expected = gaussian.solution((1 - start) * BATCH.patches + start * NOISE, start)
    rows: dict[float, list[float]] = {1.0: [], 0.7: []}
    for steps in counts:
        sigmas = np.stack(
            [flow.schedule(steps, 1.0, begin) for begin in BATCH.condition_init_sigma.ravel()], -1
        )
        sigmas = sigmas.reshape(steps + 1, *BATCH.condition_init_sigma.shape)
        error = np.asarray(sample(gaussian, BATCH, NOISE, sigmas, Guidance(), solver)) - expected
        for begin, row in rows.items():
            row.append(float(np.sqrt(np.square(error[np.float32(begin) == BATCH.init_sigma]).mean())))
    return {begin: np.array(row) for begin, row in rows.items()}


@pytest.mark.parametrize(
    ("name", "low", "high"), [("euler", 0.9, 1.1), ("heun", 1.9, 2.2), ("dpm", 1.6, 2.3)]
)
def test_errors_fall_in_order(name, low, high):
    """Each doubling of steps halves Euler's error and quarters Heun's; 2M comes near that (see `flow.multistep`)."""
    for begin, (coarse, fine) in _errors(name, (64, 128)).items():
        assert low < np.log2(coarse / fine) < high, f"from {begin}: {coarse:.2e}, {fine:.2e}"


def test_of_one_evaluation_a_step_the_higher_order_is_nearer():
    for steps in (8, 32):
        errors = [_errors(name, (steps,))[1.0][0] for name in ("euler", "dpm", "unipc")]
        assert errors[0] > 2.5 * errors[1] > 2.5 * errors[2], f"{steps} steps: {errors}"
    error = _errors("unipc", (16, 128))[1.0]
    assert np.log2(error[0] / error[1]) / 3 > 1.7


def test_a_segment_that_rested_goes_on_at_first_order():
    """What lay before its rest is no step to extrapolate from: waiting two steps or none ends at the same place."""
    sigmas = np.zeros((5, *BATCH.condition_init_sigma.shape), np.float32)
    sigmas[:] = np.array([0.6, 0.6, 0.6, 0.3, 0.0])[:, None, None]
    for name in ("dpm", "unipc"):
        waited, not_waited = (
            sample(Gaussian(0.8, 0.5), BATCH, NOISE, table, Guidance(), name)
            for table in (sigmas, sigmas[2:])
        )
        np.testing.assert_array_equal(waited, not_waited)
