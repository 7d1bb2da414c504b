"""Sigma: one noise level for each clip or for each packed sequence, and how far long clips are shifted towards noise?

    sora-jax sweep sigma
    sora-jax sweep table sigma --plot sigma.png
    sora-jax sweep sigma --debug

Arms: a sigma for each segment, shifted by its length over 8 tokens (`flow.base_tokens`; a square frame has 16); one
sigma for all segments of a sequence; and the first without a shift (base_tokens as long as a sequence), and shifted
twice as far (2).

Equal compute: the same clips, in the same order, and steps. The loss is measured with one schedule for all, the first
arm's, and in two halves: near noise, where it is decided what moves where, and near the clip.

Expected (a prediction): one sigma a sequence learns more slowly, since its gradient is noisier: a step sees two
levels in place of thirty. Without a shift the loss near the clip is lower, near noise it is higher, and the oracle
finds fewer colours and directions; twice the shift is the other way round.

Time (estimated, not measured): 12 runs of some 220 seconds of processor time each on two cores, 45 minutes in all,
and some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    levels = {
        "a segment": {},
        "a sequence": {"flow.sigma_per": "sequence"},
        "a segment, no shift": {"flow.base_tokens": 512.0},
        "a segment, twice the shift": {"flow.base_tokens": 2.0},
    }
    settings = {"split": "validation", "clips": 64, "resolution": 32 if form == "debug" else 64}
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("sigma", levels), seeds(3)),
        evaluations=[
            # The logit's mean is moved by two deviations, which leaves little of the other half.
            evaluation("loss", "near noise", overrides={"flow.mean": 2.0}),
            evaluation("loss", "near the clip", overrides={"flow.mean": -2.0}),
            evaluation("toyworld", "oracle", durations=(1.0,), **settings),
        ],
    )
