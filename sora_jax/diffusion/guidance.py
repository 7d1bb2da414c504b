"""Guidance: two or three predictions of one model, combined segment by segment.

The model is evaluated with everything, without the caption (or with the negative prompt), and, where conditioning
frames have a weight of their own, without caption and conditioning frames. Predictions are combined as denoised data
x₀ = x − σ v, where linear rules are the same as in the velocity:

    x₀ = full + (w_text − 1) (full − uncaptioned) + (w_conditioning − 1) (uncaptioned − unconditional)

which is classifier-free guidance (Ho and Salimans 2022) and, with both weights, that of Brooks et al. 2023
(equation 3): weights of 1 leave the full prediction exactly. Every setting is a table over the batch's
conditions, so the segments of a batch may all differ; means are taken over the generated tokens of one segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.models.step_cache import StepCache
from sora_jax.tokens.packing import PackedBatch

VelocityFn = Callable[..., jax.Array]
"""The velocity [B, N, P] of (patches [B, N, P], batch, σ [B, S]): `models.dit.DiT`, or any callable pytree.

A flow map also takes the σ that a step goes to, [B, S]."""

METHODS = ("cfg", "zero", "apg")
ZERO_INIT = 0.04  # share of a schedule
_TINY = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """Guidance of a segment. A field is one number, or a table float[B, S] over conditions.

    Attributes:
      text: classifier-free guidance scale; 1 is off.
      low_text: its scale for σ below `boundary`, of models with another transformer there.
      conditioning: guidance scale of the conditioning frames (the image guidance of Brooks et al.); 1 is off.
      low, high: weights apply for low < σ ≤ high and are 1 elsewhere (Kynkäänniemi et al. 2024).
      rescale: φ of Lin et al. 2023 (equations 15 and 16): 1 gives the guided velocity the standard deviation of
        the conditional one, 0 leaves it. It acts on the model's output, as diffusers' `guidance_rescale` does, so the
        same φ means the same.
      method: index into `METHODS`. "cfg" takes the formula above as it is. "zero" first scales the weaker
        prediction to fit the stronger one, s* = ⟨v, v′⟩ / ‖v′‖² (CFG-Zero*, Fan et al. 2025). "apg" removes from
        a difference the component parallel to the full x₀, and limits the norm of the rest (adaptive projected
        guidance, Sadat et al. 2024, with η = 0 and without momentum).
      norm_threshold: of "apg", the largest root mean square of a difference before its weight. The paper limits its
        norm, to r: that is r / √n for a latent of n numbers. For the bundled model differences are 0.3 to 0.7 near σ =
        1 and below 0.1 under σ = 0.5.
      zero_init_sigma: steps from a σ above it are skipped, their velocity is 0: the zero-init steps of CFG-Zero*, see
        `zero_init_sigma`. 1 skips none.
    """

    text: Any = 1.0
    conditioning: Any = 1.0
    low: Any = 0.0
    high: Any = 1.0
    rescale: Any = 0.0
    method: Any = 0
    norm_threshold: Any = 0.3
    zero_init_sigma: Any = 1.0
    low_text: Any = 1.0
    boundary: Any = 0.0

    def passes(self) -> int:
        """Model evaluations a step: 1 where no scale differs from 1, 3 where one of `conditioning` does, else 2."""
        if np.any(np.asarray(self.conditioning) != 1):
            return 3
        low = np.where(np.asarray(self.boundary) > 0, self.low_text, 1)
        return 2 if np.any(np.asarray(self.text) != 1) or np.any(low != 1) else 1

    def tables(self, shape: tuple[int, int]) -> Guidance:
        """Every field as float32[B, S]."""
        return jax.tree.map(lambda field: jnp.broadcast_to(jnp.asarray(field, jnp.float32), shape), self)


def zero_init_sigma(factor: jax.typing.ArrayLike) -> float:
    """The σ above which are the first 4% of the steps of a schedule shifted by `factor`, and at least the first one.

    Near noise a model that is not trained to the end is further from the best velocity than 0 is, so those steps are
    skipped (Fan et al. 2025, section 4.2; two of 50 steps).
    """
    # A little more than the share: the step that begins there is kept.
    return float(flow.shift(jnp.float32(1 - ZERO_INIT + 1e-4), factor))


def guided_clean(
    model: VelocityFn,
    x_bnp: jax.Array,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    guidance: Guidance,
    passes: int,
    negative_batch: PackedBatch | None = None,
    cache: StepCache | None = None,
) -> tuple[jax.Array, StepCache | None]:
    """The guided x₀, [B, N, P], and what is cached; all passes are one call of the model with `passes` times the batch.

    Args:
      x_bnp: noisy patches.
      sigma_bs: their σ by condition.
      guidance: of tables.
      passes: of `Guidance.passes`, or more.
      negative_batch: the same batch with the negative prompts, see `without_caption`.
      cache: of all passes, for the model; None: it has none.
    """
    uncaptioned = without_caption(batch, negative_batch)
    batches = (batch, uncaptioned, without_conditioning(uncaptioned))[:passes]
    all_batches = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    repeat = lambda array: jnp.concatenate([array] * passes)
    if cache is None:
        velocity = model(repeat(x_bnp), all_batches, repeat(sigma_bs))
    else:
        velocity, cache = model(repeat(x_bnp), all_batches, repeat(sigma_bs), cache=cache)
    return combine(jnp.split(velocity, passes), x_bnp, batch, sigma_bs, guidance), cache


def without_caption(batch: PackedBatch, negative_batch: PackedBatch | None = None) -> PackedBatch:
    """The batch without its captions, or with those of `negative_batch`, in the same places, active from time 0."""
    if negative_batch is None:
        return dataclasses.replace(batch, text_segment_ids=jnp.zeros_like(batch.text_segment_ids))
    return dataclasses.replace(
        batch,
        text=negative_batch.text,
        text_segment_ids=negative_batch.text_segment_ids,
        text_time=jnp.zeros_like(negative_batch.text_time),
        text_condition_ids=negative_batch.text_condition_ids,
        # Active everywhere, unlike the clip's own captions.
        condition_caption_time=jnp.zeros_like(batch.condition_caption_time),
    )


def without_conditioning(batch: PackedBatch) -> PackedBatch:
    """The batch with padding in place of conditioning tokens, and no reference patches of them."""
    segment_ids = jnp.where(batch.conditioning_mask, 0, batch.segment_ids)
    reference = None if batch.reference is None else jnp.zeros_like(batch.reference)
    return dataclasses.replace(batch, segment_ids=segment_ids, reference=reference)


def combine(
    velocities: Sequence[jax.Array],
    x_bnp: jax.Array,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    guidance: Guidance,
) -> jax.Array:
    """The guided x₀, [B, N, P], from the velocities with everything, without caption, without conditioning frames.

    The last one or two of them may be missing: then those scales have no effect.
    """
    per_token = lambda table: flow.gather_sigmas(table, batch.condition_ids)[..., None]
    mean_weights, sigma = _segment_mean_weights(batch), per_token(sigma_bs)
    mean = lambda values: jnp.einsum("bsn,bn->bs", mean_weights, values.mean(-1), precision="highest")
    clean = flow.predict_x0(x_bnp, velocities[0], sigma)
    zero, apg = (guidance.method == METHODS.index(name) for name in ("zero", "apg"))

    def difference(stronger: jax.Array, weaker: jax.Array) -> jax.Array:
        """What x₀ gains from the stronger velocity's condition, by the segment's method."""
        fit = mean(stronger * weaker) / jnp.maximum(mean(jnp.square(weaker)), _TINY)
        gain = sigma * (per_token(jnp.where(zero, fit, 1.0)) * weaker - stronger)
        size = jnp.sqrt(mean(jnp.square(gain)))
        gain *= per_token(
            jnp.where(apg, jnp.minimum(1.0, guidance.norm_threshold / jnp.maximum(size, _TINY)), 1.0)
        )
        along = mean(gain * clean) / jnp.maximum(mean(jnp.square(clean)), _TINY)
        return gain - per_token(jnp.where(apg, along, 0.0)) * clean

    def deviation(values: jax.Array) -> jax.Array:
        return jnp.sqrt(mean(jnp.square(values - per_token(mean(values)))))

    inside = (guidance.low < sigma_bs) & (sigma_bs <= guidance.high)
    text = jnp.where(sigma_bs < guidance.boundary, guidance.low_text, guidance.text)
    guided, weights = clean, (text, guidance.conditioning)
    for weight, stronger, weaker in zip(weights, velocities, velocities[1:], strict=False):
        guided += per_token(jnp.where(inside, weight - 1.0, 0.0)) * difference(stronger, weaker)
    # x₀' = x − σ f v, for the guided velocity v and its factor f = φ std(full) / std(v) + 1 − φ.
    velocity = velocities[0] - jnp.where(sigma > 0, guided - clean, 0.0) / jnp.maximum(sigma, 1e-8)
    ratio = deviation(velocities[0]) / jnp.maximum(deviation(velocity), _TINY)
    return guided - per_token(jnp.where(inside, guidance.rescale * (ratio - 1.0), 0.0)) * sigma * velocity


def _segment_mean_weights(batch: PackedBatch) -> jax.Array:
    """float[B, S, N]: 1/n at each of the n generated tokens of a condition's segment: a product is their mean."""
    same_segment = batch.condition_segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    owned = (same_segment & (batch.condition_ids > 0)[:, None, :]).astype(jnp.float32)
    return owned / jnp.maximum(owned.sum(-1, keepdims=True), 1.0)
