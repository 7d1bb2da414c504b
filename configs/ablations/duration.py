"""Durations: is a model better taught with clips of all lengths, or with clips of one?

    sora-jax sweep duration
    sora-jax sweep table duration --plot duration.png
    sora-jax sweep duration --debug

Arms: all clips cut to one second; clips of half a second, one and two with pictures among them; the same without
pictures. All are measured on the same held-out pictures and clips of half a second, one and two, and of three, which
none of them learned.

Equal compute: steps, and positions a step (1,024 of clips, 512 of captions), are the same for all.

Expected (a prediction): at one second the fixed length is best, by little; pictures are far worse without pictures in
training than with them; three seconds are best after mixed lengths. Pictures, a fifth of a clip's tokens each, bring
colour and shape sooner, so the oracle's share of both is highest with them.

Outcome: experiments/duration, with --config.steps=450 --config.latents.clips=2000.

Time (measured): 9 runs; so shortened, one trains for 111 to 126 seconds of processor time on two cores, and takes
twice that in all, with what is measured. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    size = 32 if form == "debug" else 64
    lengths = {
        "fixed": {"data.durations": (1.0,)},
        "native": {"data.durations": (0.0, 0.5, 1.0, 2.0)},
        "native, no pictures": {"data.durations": (0.5, 1.0, 2.0)},
    }
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("lengths", lengths), seeds(3)),
        evaluations=[
            *(
                evaluation("loss", f"{seconds:g} s", overrides={"data.durations": (seconds,)})
                for seconds in ((0.0, 0.5, 1.0, 2.0, 3.0) if form != "debug" else (0.0,))
            ),
            evaluation("toyworld", "1 s", split="validation", clips=64, resolution=size, durations=(1.0,)),
        ],
    )
