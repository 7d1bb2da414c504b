"""Sizes: is a model better taught at its clips' own sizes, or at one fixed size?

    sora-jax sweep resolution
    sora-jax sweep table resolution --plot resolution.png
    sora-jax sweep resolution --debug

Arms: all clips scaled to 64 pixels; clips of 32, 64 and 96 pixels packed together; the same in buckets, a batch of one
size and duration each (as Open-Sora's); the same padded, one a sequence as long as the longest clip. All are measured
on the same held-out clips of 32, 64 and 96 pixels, and of 48 and 128, which none of them learned.

Equal compute: steps, and positions a step with their padding (1,024 of clips, 512 of captions) are the same, so the
padded arm learns from fewer clips; a bucket of small pictures is full of captions before it is full of tokens.
Attention costs the fixed size a little less.

Expected (a prediction): at 64 pixels the fixed size is best, by little; at every other size, 128 among them, native
sizes are, by more; buckets are behind packed clips by little, as the gradient of a batch of one size is noisier;
padded ones are behind all, as they see half as many clips.

Outcome: experiments/resolution, with --config.steps=450 --config.latents.clips=2000.

Time (measured): 12 runs; so shortened, one trains for 104 to 118 seconds of processor time on two cores, and takes
twice that in all, with what is measured. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    size = 32 if form == "debug" else 64
    native = {"data.resolutions": (size // 2, size, size * 3 // 2)}
    # The longest clip: three latent frames of 6x6 tokens.
    padded = {"max_segments": 1, "seq_len": 128, "text_len": 64, "batch_size": 8}
    # A batch of one sequence, as long as two.
    bucket = {"buckets": True, "batch_size": 1, "seq_len": 1024, "text_len": 512, "max_segments": 48}
    sizes = {
        "fixed": {"data.resolutions": (size,)},
        "native": native,
        "native, in buckets": native | {f"pipeline.{name}": value for name, value in bucket.items()},
        "native, padded": native | {f"pipeline.{name}": value for name, value in padded.items()},
    }
    measured = (size // 2, size * 3 // 4, size, size * 3 // 2, size * 2)
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("sizes", sizes), seeds(3)),
        evaluations=[
            *(
                evaluation("loss", f"{one} px", overrides={"data.resolutions": (one,)})
                for one in (measured if form != "debug" else measured[:1])
            ),
            evaluation(
                "toyworld", f"{size} px", split="validation", clips=64, resolution=size, durations=(1.0,)
            ),
        ],
    )
