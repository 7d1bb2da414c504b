"""Captions: does a model learn more from detailed captions than from short ones (DALL-E 3, Sora)?

    sora-jax sweep captions
    sora-jax sweep table captions --plot captions.png
    sora-jax sweep captions --debug

Arms: short captions ("a red circle moves left"), detailed ones (which also say size, place and background), and both,
as often as each other; and short captions of which three in ten are another clip's, as text found beside videos is
brief and often about something else, so that detailed ones are to it what re-captioned data are in DALL-E 3. All are
measured with both kinds of true captions on the same held-out clips, and the oracle reads clips of short prompts, which
a person would write, and of the same prompts expanded before sampling (background and camera are added).

Equal compute: the same clips, in the same order, and steps; room for captions is that of detailed ones for all.

Expected (a prediction): detailed captions make the loss with detailed ones lowest, as they say more of what is seen;
with short prompts the model that saw them alone is best and the one that saw detailed ones alone worst, since it never
saw so few words, and expansion gives it most of that back; both are nearly as good as either on its own ground; wrong
captions cost more than brief ones, in every attribute that is asked for.

Time (estimated, not measured): 12 runs of some 280 seconds of processor time each on two cores, 55 minutes in all, and
some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    weights = {
        "short": {"short": 1.0},
        "detailed": {"detailed": 1.0},
        "both": {"short": 1.0, "detailed": 1.0},
    }
    kinds = {name: {"pipeline.caption_weights": weights[name]} for name in weights}
    kinds["short, 3 in 10 wrong"] = kinds["short"] | {"pipeline.caption_noise": 0.3}
    settings = {"split": "validation", "clips": 64, "resolution": 32 if form == "debug" else 64}
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("captions", kinds), seeds(3)),
        fixed={"pipeline.text_len": 512},
        evaluations=[
            *(
                evaluation("loss", f"{name} captions", overrides={"pipeline.caption_weights": weights[name]})
                for name in ("short", "detailed")
            ),
            *(
                evaluation("toyworld", name, durations=(1.0,), expand=expand, **settings)
                for name, expand in (("short prompts", False), ("expanded prompts", True))
            ),
        ],
    )
