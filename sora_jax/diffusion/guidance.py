"""Guidance: one model asked two or three times, and its answers combined run by run.

The model is asked with everything, without words (or with negative ones), and, where given frames have a weight of
their own, without words and given frames. Answers are combined as denoised data x₀ = x − σ v, where linear rules
are the same as in the velocity:

    x₀ = full + (w_text − 1) (full − wordless) + (w_given − 1) (wordless − bare)

which is classifier-free guidance (Ho and Salimans 2022) and, with both weights, that of Brooks et al. 2023
(equation 3): weights of 1 leave the full answer exactly. Every setting is a table by entry of the batch's
conditions, so runs in one batch may all differ; whatever is averaged is averaged over one run's painted tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion import flow
from sora_jax.tokens.packing import PackedBatch, Placement

Model = Callable[[jax.Array, PackedBatch, jax.Array], jax.Array]
"""The velocity [B, N, P] of (patches [B, N, P], batch, σ [B, S]): `models.dit.DiT`, or any pytree that is called so."""

METHODS = ("cfg", "zero", "apg")
ZERO_INIT = 0.04  # share of a schedule
_TINY = 1e-12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly a run is led. A field is one number, or a table float[B, S] by entry (see `tabulate`).

    Attributes:
      text: weight of the words; 1 is none.
      given: weight of the given frames; 1 is none.
      low, high: weights hold for low < σ ≤ high and are 1 elsewhere (Kynkäänniemi et al. 2024).
      rescale: φ of Lin et al. 2023 (equations 15 and 16): 1 gives the guided velocity the deviation of the one that is
        not guided, 0 leaves it. It acts on the model's output, as diffusers' `guidance_rescale` does, so the same φ
        means the same.
      method: index into `METHODS`. "cfg" takes the formula above as it is. "zero" first scales the weaker answer to
        be as near to the stronger as it gets, s* = ⟨v, v′⟩ / ‖v′‖² (CFG-Zero*, Fan et al. 2025). "apg" leaves out of
        a difference what lies along the full x₀, and limits the rest (adaptive projected guidance, Sadat et al.
        2024, with η = 0 and without momentum).
      limit: of "apg", the largest root mean square of a difference before its weight. The paper limits its norm, to
        r: that is r / √n for a latent of n numbers. For the bundled model differences are 0.3 to 0.7 near σ = 1 and
        below 0.1 under σ = 0.5.
      hold: a step from a level above it is left out, the tokens stay: the zero-init steps of CFG-Zero*, see
        `zero_init`. 1 leaves out none.
    """

    text: Any = 1.0
    given: Any = 1.0
    low: Any = 0.0
    high: Any = 1.0
    rescale: Any = 0.0
    method: Any = 0
    limit: Any = 0.3
    hold: Any = 1.0

    def passes(self) -> int:
        """How often the model is asked: 1 where no weight differs from 1, 3 where one of given frames does, else 2."""
        if np.any(np.asarray(self.given) != 1):
            return 3
        return 2 if np.any(np.asarray(self.text) != 1) else 1

    def tables(self, shape: tuple[int, int]) -> Guidance:
        """Every field as float32[B, S]."""
        return jax.tree.map(lambda field: jnp.broadcast_to(jnp.asarray(field, jnp.float32), shape), self)


def zero_init(factor: jax.typing.ArrayLike) -> float:
    """`hold` for a run whose levels are shifted by `factor`: the first 4% of its steps, and at least the first one.

    Near noise a model that is not trained to the end is further from the best velocity than 0 is, so those steps are
    left out (Fan et al. 2025, section 4.2; two of 50 steps).
    """
    return float(flow.shift(jnp.float32(1 - ZERO_INIT + 1e-4), factor))  # a level at the share itself moves


def tabulate(
    each: Sequence[Guidance], places: Sequence[Placement], condition_runs_bs: np.ndarray
) -> Guidance:
    """Tables float32[B, S] of settings that are given by run, in the order of `pack_rows`; the rest is unguided."""
    whole = {}
    for field in dataclasses.fields(Guidance):
        table = np.full(condition_runs_bs.shape, field.default, np.float32)
        for guidance, place in zip(each, places, strict=True):
            table[place.row, condition_runs_bs[place.row] == place.segment] = getattr(guidance, field.name)
        whole[field.name] = table
    return Guidance(**whole)


def guided_clean(
    model: Model,
    x_bnp: jax.Array,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    guidance: Guidance,
    passes: int,
    negative: PackedBatch | None = None,
) -> jax.Array:
    """The guided x₀, [B, N, P]; all passes are one call of the model with that many times the rows.

    Args:
      x_bnp: noisy patches.
      sigma_bs: their levels by entry.
      guidance: of tables.
      passes: of `Guidance.passes`, or more.
      negative: the same rows with other words, see `without_words`.
    """
    wordless = without_words(batch, negative)
    asked = (batch, wordless, without_given(wordless))[:passes]
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *asked)
    again = lambda array: jnp.concatenate([array] * passes)
    velocities = jnp.split(model(again(x_bnp), rows, again(sigma_bs)), passes)
    return combine(velocities, x_bnp, batch, sigma_bs, guidance)


def without_words(batch: PackedBatch, negative: PackedBatch | None = None) -> PackedBatch:
    """The batch without its words, or with those of `negative`: the same rows and slots, words that hold at time 0."""
    if negative is None:
        return dataclasses.replace(batch, text_segment_ids=jnp.zeros_like(batch.text_segment_ids))
    return dataclasses.replace(
        batch,
        text=negative.text,
        text_segment_ids=negative.text_segment_ids,
        text_time=jnp.zeros_like(negative.text_time),
        text_condition_ids=negative.text_condition_ids,
        condition_caption_time=jnp.zeros_like(
            batch.condition_caption_time
        ),  # in force everywhere, whatever the clip's own words do
    )


def without_given(batch: PackedBatch) -> PackedBatch:
    """The batch with the slots of given tokens empty, and no hint of them."""
    emptied = jnp.where(batch.given, 0, batch.segment_ids)
    reference = None if batch.reference is None else jnp.zeros_like(batch.reference)
    return dataclasses.replace(batch, segment_ids=emptied, reference=reference)


def combine(
    velocities: Sequence[jax.Array],
    x_bnp: jax.Array,
    batch: PackedBatch,
    sigma_bs: jax.Array,
    guidance: Guidance,
) -> jax.Array:
    """The guided x₀, [B, N, P], from the velocities with everything, without words, without given frames.

    The last one or two of them may be missing: then those weights have no effect.
    """
    per_token = lambda table: flow.gather_sigmas(table, batch.condition_ids)[..., None]
    shares, sigma = _run_shares(batch), per_token(sigma_bs)
    mean = lambda values: jnp.einsum("bsn,bn->bs", shares, values.mean(-1), precision="highest")
    clean = flow.denoise(x_bnp, velocities[0], sigma)
    zero, apg = (guidance.method == METHODS.index(name) for name in ("zero", "apg"))

    def difference(stronger: jax.Array, weaker: jax.Array) -> jax.Array:
        """What x₀ gains from the stronger velocity's condition, as the run's method has it."""
        fit = mean(stronger * weaker) / jnp.maximum(mean(jnp.square(weaker)), _TINY)
        gain = sigma * (per_token(jnp.where(zero, fit, 1.0)) * weaker - stronger)
        size = jnp.sqrt(mean(jnp.square(gain)))
        gain *= per_token(jnp.where(apg, jnp.minimum(1.0, guidance.limit / jnp.maximum(size, _TINY)), 1.0))
        along = mean(gain * clean) / jnp.maximum(mean(jnp.square(clean)), _TINY)
        return gain - per_token(jnp.where(apg, along, 0.0)) * clean

    def deviation(values: jax.Array) -> jax.Array:
        return jnp.sqrt(mean(jnp.square(values - per_token(mean(values)))))

    inside = (guidance.low < sigma_bs) & (sigma_bs <= guidance.high)
    guided, weights = clean, (guidance.text, guidance.given)
    for weight, stronger, weaker in zip(weights, velocities, velocities[1:], strict=False):
        guided += per_token(jnp.where(inside, weight - 1.0, 0.0)) * difference(stronger, weaker)
    # x₀' = x − σ f v, for the guided velocity v and its factor f = φ std(full) / std(v) + 1 − φ.
    velocity = velocities[0] - jnp.where(sigma > 0, guided - clean, 0.0) / jnp.maximum(sigma, 1e-8)
    calmed = deviation(velocities[0]) / jnp.maximum(deviation(velocity), _TINY)
    return guided - per_token(jnp.where(inside, guidance.rescale * (calmed - 1.0), 0.0)) * sigma * velocity


def _run_shares(batch: PackedBatch) -> jax.Array:
    """float[B, S, N]: 1/n at each of the n painted tokens of an entry's run, so a product with it is their mean."""
    same_run = batch.condition_segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    owned = (same_run & (batch.condition_ids > 0)[:, None, :]).astype(jnp.float32)
    return owned / jnp.maximum(owned.sum(-1, keepdims=True), 1.0)
