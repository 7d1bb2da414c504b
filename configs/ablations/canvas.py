"""Canvas: does one model that learns all abilities lose against one for each, and what is noise on the context worth?

    sora-jax sweep canvas
    sora-jax sweep table canvas --plot canvas.png
    sora-jax sweep canvas --debug

Arms: a mixture of all canvases (nothing is given, the first frame, the begin, a box is left to fill, later windows of a
long clip); and models that learn one each: text to video, animating a first frame, filling a box, going on from a clean
begin, and going on as later windows do, from frames at one low sigma (diffusion forcing, Chen et al. 2024; history
guidance, Song et al. 2025). All are measured on each canvas, by the error of what is left to generate.

Equal compute: the same clips, in the same order, and steps.

Expected (a prediction): on its own canvas each specialist is ahead of the mixture, by little, since what moves how is
the same everywhere; on any other canvas it is far behind. The model that learned from noisy contexts is ahead on noisy
ones, and hardly behind on clean ones.

Time (estimated, not measured): 18 runs of some 150 seconds of processor time each on two cores, 25 minutes in all, and
some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep

MEASURED = {
    "text to video": {"none": 1.0},
    "first frame": {"first": 1.0},
    "box": {"box": 1.0},
    "clean begin": {"begin": 1.0},
    "noisy context": {"context": 1.0},
}


def get_sweep(form: str = "quick") -> Sweep:
    mixture = {kind: 1.0 for canvas in MEASURED.values() for kind in canvas}
    learned = {"all": mixture} | MEASURED
    return Sweep(
        f"toyworld_dit:{form}",
        product(
            arms("canvas", {name: {"pipeline.canvases": weights} for name, weights in learned.items()}),
            seeds(3),
        ),
        # A picture leaves nothing to go on from.
        fixed={"data.durations": (1.0, 2.0)} if form != "debug" else {},
        evaluations=[
            evaluation("loss", name, overrides={"pipeline.canvases": weights})
            for name, weights in list(MEASURED.items())[: None if form != "debug" else 2]
        ],
    )
