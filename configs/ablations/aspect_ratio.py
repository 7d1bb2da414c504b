"""Aspect ratios: does a model that learned from square crops frame its subject worse (Sora, "improved framing")?

    sora-jax sweep aspect_ratio
    sora-jax sweep table aspect_ratio --metric loss --metric inside --metric colour --plot aspect_ratio.png
    sora-jax sweep aspect_ratio --debug

Arms: the middle square of clips of 16:9, 9:16 and 4:3, captions unchanged; all of each in a square of the same size,
between black bars; the clips as they are, shapes packed together; the same in buckets, a batch of one shape each (as
Open-Sora's); and two buckets, in which every clip is rendered square or 16:9. All are measured on the same held-out
clips of 1:1, 16:9 and 9:16, and of 21:9, which none of them learned; and the oracle says how often one thing is there,
and inside the frame.

Equal compute: steps, and positions a step (1,024 of clips, 512 of captions), are the same for all; of squares, which
have fewer tokens, a step has more.

Expected (a prediction): crops are as good as the others at 1:1 by the loss on crops, and worse at 1:1 on whole
scenes, where the thing is always inside; they are far worse at 16:9 and 9:16. Of what they draw, fewer things are
inside the frame. Letterboxed ones keep things inside, and are worse than crops by the loss everywhere: they saw
things at half the size, and draw bars. Buckets are behind the packed clips by little: the gradient of a batch of one
shape is noisier.

Outcome: experiments/aspect_ratio, with --config.steps=450 --config.latents.clips=2000.

Time (measured): 15 runs; so shortened, one trains for 113 to 126 seconds of processor time on two cores, and takes
twice that in all, with what is measured. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    size = 32 if form == "debug" else 64
    native = {"data.aspects": ("16:9", "9:16", "4:3")}
    # A batch of one sequence, as long as two.
    bucket = {"buckets": True, "batch_size": 1, "seq_len": 1024, "text_len": 512, "max_segments": 48}
    frames = {
        "square crops": native | {"data.crop": "square"},
        "letterboxed": native | {"data.crop": "letterbox"},
        "native": native,
        "native, in buckets": native | {f"pipeline.{name}": value for name, value in bucket.items()},
        "two buckets": {"data.aspects": ("1:1", "16:9")},
    }
    measured = ("1:1", "16:9", "9:16", "21:9") if form != "debug" else ("1:1",)
    drawn = measured[:3]
    settings = {"split": "validation", "clips": 64, "resolution": size, "durations": (1.0,)}
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("frames", frames), seeds(3)),
        evaluations=[
            *(evaluation("loss", one, overrides={"data.aspects": (one,)}) for one in measured),
            *(evaluation("toyworld", one, aspects=(one,), **settings) for one in drawn),
        ],
    )
