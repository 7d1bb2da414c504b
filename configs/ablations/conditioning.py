"""Conditioning: by which ways should a caption reach the tokens, and what do its states come from?

    sora-jax sweep conditioning
    sora-jax sweep table conditioning --plot conditioning.png
    sora-jax sweep conditioning --debug

Arms, each one change from the first: caption tokens in the sequence (DiT's in-context conditioning) and their mean in
adaLN-Zero's condition; the tokens alone; the first without the noise on captions' states; without dropped captions;
and with a hash of the words in place of MiniLM's states, which knows words but not that two of them are near.
Cross-attention and adaLN-Zero without tokens, DiT's other two ways, aren't in this transformer.

Equal compute: the same clips, in the same order, and steps; the mean in the condition costs one small matrix.

Expected (a prediction): the tokens alone learn colours later, and are behind in every attribute; noise and dropped
captions cost a little loss and show only with guidance; the hash is as good on words of training and better for these
few steps, since each word has a vector of its own.

Time (estimated, not measured): 15 runs of some 230 seconds of processor time each on two cores, an hour in all, and
some minutes for encoding clips. On one GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    debug = form == "debug"
    ways = {
        "tokens and their mean": {},
        "tokens alone": {"dit.pooled_text": False},
        "no noise on states": {"flow.text_noise": 0.0},
        "no dropped captions": {"flow.text_dropout": 0.0},
        "hash of words": {"text.kind": "hash", "text.width": 32 if debug else 384},
    }
    settings = {"split": "validation", "clips": 64, "resolution": 32 if debug else 64, "durations": (1.0,)}
    return Sweep(
        f"toyworld_dit:{form}",
        # The debug form has a hash already.
        product(arms("conditioning", dict(list(ways.items())[: 4 if debug else None])), seeds(3)),
        evaluations=[
            evaluation("loss"),
            evaluation("toyworld", "guidance 1", guidance=1.0, **settings),
            evaluation("toyworld", "guidance 3", guidance=3.0, **settings),
        ],
    )
