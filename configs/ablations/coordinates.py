"""Coordinates: in which units does a token say where it is, so that other sizes and aspect ratios are no surprise?

    sora-jax sweep coordinates
    sora-jax sweep table coordinates --plot coordinates.png
    sora-jax sweep coordinates --debug

Arms: places in short sides of the frame ("fractional", the default); each side in its own length, as NaViT's
fractional coordinates are ("normalized"); in patches from the corner ("absolute"); and the first with Fourier
features of them added to the tokens (`dit.absolute`), besides RoPE. The features are a sum of one part for each of
time, y and x, as NaViT's factorised embeddings are; learned tables of positions, which NaViT has too, aren't here.
Training has clips of 64 pixels, 1:1, 16:9 and 9:16; all arms are measured there, at 96 and 128 pixels, and at 21:9.

Equal compute: the same clips, in the same order, and steps; only the fourth arm has one small matrix more.

Expected (a prediction): all alike at the sizes that were learned; at 128 pixels absolute coordinates are worst, by
much; at 21:9 normalized ones are. Fourier features help everywhere, as direction begins with where a thing is.

Time (estimated, not measured): 12 runs of some 190 seconds of processor time each on two cores, 40 minutes in all,
and some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    size = 32 if form == "debug" else 64
    units = {
        "fractional": {"dit.absolute": False},
        "normalized": {"dit.absolute": False, "dit.coords": "normalized"},
        "absolute": {"dit.absolute": False, "dit.coords": "absolute"},
        "fractional, with features": {"dit.absolute": True},
    }
    unseen = {
        "as learned": {},
        f"{size * 3 // 2} px": {"data.resolutions": (size * 3 // 2,)},
        f"{size * 2} px": {"data.resolutions": (size * 2,)},
        "21:9": {"data.aspects": ("21:9",)},
    }
    return Sweep(
        f"toyworld_dit:{form}",
        product(arms("coordinates", units), seeds(3)),
        fixed={"data.aspects": ("1:1", "16:9", "9:16")} if form != "debug" else {},
        evaluations=[
            evaluation("loss", name, overrides=changes)
            for name, changes in list(unseen.items())[: None if form != "debug" else 1]
        ],
    )
