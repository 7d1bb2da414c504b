"""Packing: what is it worth to share a sequence (NaViT), to drop tokens, and to mix pictures in?

    sora-jax sweep packing
    sora-jax sweep table packing --plot packing.png
    sora-jax sweep packing --debug

Arms: clips and pictures packed; the same, one a sequence as long as the longest; packed, with half of the tokens
skipping the layers between the first and the last (TREAD, which drops tokens and gives them back, as a diffusion
model needs a velocity of each; NaViT drops them for good); packed, of clips without pictures.

Equal compute: positions of all layers. A step has 1,024 of clips and 512 of captions, padding included, for all; half
of the tokens skip two of four layers, so that arm takes 1.2 times as many steps (captions' positions never skip).

Expected (a prediction): packed, a step has twice as many clips as padded, and the loss is clearly lower; routing
gains a little for equal compute, as its further steps outweigh what they lack; without pictures clips are learned as
well by the loss, and shapes later.

Time (estimated, not measured): 12 runs of some 220 seconds of processor time each on two cores, 45 minutes in all,
and some minutes for encoding clips. On one GPU: not run. What packing does to the pace alone is in
experiments/packing.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    debug = form == "debug"
    # A second of 64 pixels is 48 tokens.
    padded = {"max_segments": 1, "seq_len": 64, "text_len": 64 if debug else 32, "batch_size": 16}
    skipping = {"flow.routing": 0.5, "dit.layers": 3} if debug else {"flow.routing": 0.5, "steps": 720}
    ways = {
        "packed": {},
        "padded": {f"pipeline.{name}": value for name, value in padded.items()},
        "packed, half skip": skipping,
        "packed, no pictures": {"data.durations": (1.0,)},
    }
    settings = {"split": "validation", "clips": 64, "resolution": 32 if debug else 64, "durations": (1.0,)}
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("packing", ways), seeds(3)),
        fixed={"text.max_tokens": 32},
        evaluations=[
            evaluation("loss", "clips and pictures"),
            evaluation("loss", "clips", overrides={"data.durations": (1.0,)}),
            evaluation("toyworld", "oracle", **settings),
        ],
    )
