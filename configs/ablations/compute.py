"""Compute: how does what is learned grow with a step's arithmetic, by width and by finer patches (DiT, Sora)?

    sora-jax sweep compute
    sora-jax sweep table compute --plot compute.png
    sora-jax sweep compute --debug

Arms: two sizes (Pico, and Nano of 3.4 times the parameters) times three patches (4x4, 2x2 and single cells of the
latent: 4, 16 and 64 tokens a square frame). Finer patches make more tokens of the same clip, so sequences are longer,
for as many clips a step.

Compute differs here, that is what is varied: steps and clips are the same for all, and the table has each arm's
counted operations ("TFLOP", forward and backward, without padding) beside what it learned.

Expected (a prediction): the loss falls with counted operations whichever way they are spent, as in DiT (there the
correlation of FID with log GFLOPs is -0.93); patches matter more than width, most of all for shapes.

Time (estimated, not measured): 18 runs of 150 to 900 seconds of processor time each on two cores, two hours in all,
and some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, param, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    debug = form == "debug"
    sizes = param("dit.width", [32, 48], "size") if debug else param("dit.size", ["Pico", "Nano"], "size")
    patches = {
        f"{side}x{side}": {
            "dit.patch": (1, side, side),
            "pipeline.seq_len": 2048 // side**2 // (4 if debug else 1),
            "flow.base_tokens": 32 / side**2,
        }
        for side in ((2, 1) if debug else (4, 2, 1))
    }
    settings = {"split": "validation", "clips": 64, "resolution": 32 if debug else 64, "durations": (1.0,)}
    return Sweep(
        f"toyworld_dit:{form}",
        product(sizes, arms("patch", patches), seeds(3)),
        evaluations=[
            evaluation("loss", own=("pipeline.seq_len", "flow.base_tokens")),
            evaluation("toyworld", "oracle", **settings),
        ],
    )
