"""What is tried: each lever is one or more stages of training, each a few fields over configs/toyworld_dit.py."""

from __future__ import annotations

import dataclasses
from typing import Any

# The recipe of before these experiments, which configs/toyworld_dit.py no longer has: what every lever changes.
BASELINE: dict[str, Any] = {
    "data.durations": (0.0, 1.0, 2.0, 2.0, 3.0),
    "pipeline.batch_size": 2,
    "pipeline.text_len": 96,
    "pipeline.canvases": {
        "none": 0.6,
        "first": 0.12,
        "begin": 0.1,
        "box": 0.08,
        "margins": 0.05,
        "levels": 0.05,
    },
    "optim.lr": 6e-4,
}
IMAGES: dict[str, Any] = {
    "data.durations": (0.0,),
    "latents.layouts": {"none": 1.0},
    "latents.clips": 24_000,
    "pipeline.canvases": {"none": 0.85, "box": 0.15},
    "pipeline.text_len": 256,  # nine images of 64 tokens a sequence, each with its caption
}
COARSE: dict[str, Any] = {  # four cells a token: as many clips a sequence four times as short
    "dit.patch": (1, 2, 2),
    "pipeline.seq_len": 640,
    "pipeline.text_len": 384,
    "pipeline.frame_tokens": 36,
    "flow.base_tokens": 8.0,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
      share: of the run's processor time.
      changes: fields of the configuration.
      repatch: whether the weights of the stage before are cut into smaller patches first.
    """

    share: float = 1.0
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    repatch: bool = False


@dataclasses.dataclass(frozen=True)
class Lever:
    """A way to train, and what was expected of it before it was run (experiments/LOG.md has the outcome)."""

    prediction: str
    stages: tuple[Stage, ...]


def _one(prediction: str, **changes: Any) -> Lever:
    return Lever(
        prediction, (Stage(1.0, {name.replace("__", "."): value for name, value in changes.items()}),)
    )


LEVERS = {
    "baseline": Lever("the recipe of before", (Stage(),)),
    "lr2e-3": _one("faster: 6e-4 was chosen to go on from a trained model", optim__lr=2e-3),
    "lr5e-3": _one("too much, or as 2e-3", optim__lr=5e-3),
    "clean": _one("as the baseline: 16 numbers a token are few", dit__predict="clean"),
    "routing": _one("1.3 times the steps, each worth as much: better", flow__routing=0.5),
    "contrast": _one("little at 0.05", flow__contrast=0.05),
    "self-guidance": _one(
        "a fifth fewer steps; sampled without guidance, its default, colour as the baseline at guidance 3 or up to ten "
        "points below, since the difference that guides is learned slowly; held-out loss worse, which is of the plain "
        "velocity",
        flow__self_guidance=3.0,
    ),
    "power averages": _one(
        "nothing at 0.05 and 0.1, 0.01 of held-out loss between the best length and those: up to step 9,000 the "
        "warm-up of the exponential average makes it a power function of length 0.09, and the falling learning rate "
        "averages too",
        optim__ema_lengths=(0.05, 0.1),
        optim__ema_every=100,
    ),
    "batch ramp": _one(
        "0 to 0.02 of held-out loss worse: at a few sequences a batch each update is worth more than its noise, the "
        "falling learning rate calms that at the end too, and the optimizer is computed for every batch all the same",
        optim__accumulate_doubles=(400, 700),
    ),
    "images": Lever(
        "colour and shape in half of the time: a clip's frames repeat one shape",
        (Stage(0.5, IMAGES), Stage(0.5)),
    ),
    "together": Lever(
        "the baseline's loss of 600 seconds in 200: 2e-3 alone had it in less than half of its steps",
        (
            Stage(0.5, IMAGES | {"optim.lr": 2e-3, "dit.predict": "clean"}),
            Stage(0.5, {"optim.lr": 2e-3, "dit.predict": "clean"}),
        ),
    ),
    "together, routing": Lever(
        "5% more steps' worth than together: half of the tokens are not computed, and runs are short",
        (
            Stage(0.5, IMAGES | {"optim.lr": 2e-3, "dit.predict": "clean", "flow.routing": 0.5}),
            Stage(0.5, {"optim.lr": 2e-3, "dit.predict": "clean", "flow.routing": 0.5}),
        ),
    ),
    "coarse": Lever(
        "better in loss early: four times as many clips a second",
        (Stage(0.5, COARSE), Stage(0.5, repatch=True)),
    ),
}
