"""Conditioning: by which ways should a caption reach the tokens, and what do its states come from?

    sora-jax sweep conditioning
    sora-jax sweep table conditioning --plot conditioning.png
    sora-jax sweep conditioning --debug

Arms, each one change from the first: caption tokens in the sequence (DiT's in-context conditioning) and their mean in
adaLN-Zero's condition; the tokens alone; cross-attention to the tokens in each block, in place of tokens in the
sequence; the mean alone (DiT's adaLN-Zero); the first without the noise on captions' states; without dropped captions;
and with a hash of the words in place of MiniLM's states, which knows words but not that two of them are near. Sigma
reaches the tokens by adaLN-Zero in all of them.

Equal compute: the same clips, in the same order, and steps, not operations, which the table has ("TFLOP"): by
arithmetic, without padding, cross-attention costs 0.94 and the mean alone 0.77 of the first, since caption tokens don't
go through the layers. With padding (a step has 1,024 positions of clips and 512 of captions), 1.05 and 0.67.

Expected (a prediction): the tokens alone learn colours later, and are behind in every attribute; cross-attention,
which begins at zero and has parameters of its own, is behind the first by little; the mean alone is as good while a
clip has one thing, whose words need no order; noise and dropped captions cost a little loss and show only with
guidance; the hash is as good on words of training and better for these few steps, since each word has a vector of its
own.

Outcome: experiments/conditioning, the first four arms with --config.steps=450 --config.latents.clips=2000.

Time (measured): 21 runs; so shortened, one trains for 96 to 135 seconds of processor time on two cores. On one
GPU: not run.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep


def get_sweep(form: str = "quick") -> Sweep:
    debug = form == "debug"
    ways = {
        "tokens and their mean": {},
        "tokens alone": {"dit.pooled_text": False},
        "cross-attention and the mean": {"dit.caption": "cross"},
        "the mean alone": {"dit.caption": "pooled"},
        "no noise on states": {"flow.text_noise": 0.0},
        "no dropped captions": {"flow.text_dropout": 0.0},
        "hash of words": {"text.kind": "hash", "text.width": 32 if debug else 384},
    }
    settings = {"split": "validation", "clips": 64, "resolution": 32 if debug else 64, "durations": (1.0,)}
    return Sweep(
        f"toyworld_dit:{form}",
        # The debug form has a hash already.
        product(arms("conditioning", dict(list(ways.items())[: -1 if debug else None])), seeds(3)),
        evaluations=[
            evaluation("loss"),
            evaluation("toyworld", "guidance 1", guidance=1.0, **settings),
            evaluation("toyworld", "guidance 3", guidance=3.0, **settings),
        ],
    )
