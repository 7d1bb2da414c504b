"""A small sweep to be read in read_ablation.ipynb: three ways to train the debug model, three seeds each.

    sora-jax sweep notebooks/ablation.py --out runs/ablation

Question: what do a learning rate a tenth as high, and more open sequences in the packer, do to the held-out loss?

Expected: the low learning rate is far behind after so few steps; the packer fills sequences a little better, which no
loss of so short a run shows. Time: nine runs of half a minute of processor time.
"""

from sora_jax.sweep.algebra import arms, product, seeds
from sora_jax.sweep.points import Sweep


def get_sweep() -> Sweep:
    changes = {
        "baseline": {},
        "low learning rate": {"optim.lr": 2e-4},
        "more open sequences": {"pipeline.num_packing_bins": 16},
    }
    data = {"pipeline.batch_size": 1, "latents.clips": 256}
    fixed = data | {"steps": 60, "log.every": 20, "log.heldout_every": 20, "log.sheet_every": 0}
    return Sweep("toyworld_dit:debug", product(arms("change", changes), seeds(3)), fixed)
