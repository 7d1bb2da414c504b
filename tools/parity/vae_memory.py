"""Time and memory of training steps of an autoencoder's decoder in true shapes, with random weights.

    python tools/parity/vae_memory.py FOLDER [--frames 5] [--side 64] [--no-remat] [--all] [--dtype bfloat16]

FOLDER is true_shapes.py's, `--vae-only` will do. Prints what XLA says a step takes, the process's peak
after some steps, and the fastest one's seconds.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np

from sora_jax.train.__main__ import make_config
from sora_jax.train.loop import make_steps
from sora_jax.train.loop_config import read_loop_config
from sora_jax.train.objectives import make_objective

STEPS = 3


def main() -> None:
    """Compiles a step, and takes some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--no-remat", action="store_true")
    parser.add_argument("--all", action="store_true", help="the encoder learns too")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    own = {
        "pretrained": str(given.folder),
        "loss.crop": f"{given.frames},{given.side},{given.side}",
        "autoencoder.remat": str(not given.no_remat),
        "autoencoder.dtype": given.dtype,
        "optim.trainable": "" if given.all else "^decoder/",
    }
    config = make_config("finetune_vae", own)
    with tempfile.TemporaryDirectory() as workdir:
        objective = make_objective(config, pathlib.Path(workdir))
    init, step = make_steps(objective, read_loop_config(config).optim)
    root = jax.random.key(0)
    state = jax.jit(init, donate_argnums=1)(root, objective.initial)
    batch = {
        name: np.random.default_rng(0).integers(0, 256, leaf.shape, leaf.dtype)
        for name, leaf in objective.shapes(1).items()
    }
    began = time.perf_counter()
    update = jax.jit(step, donate_argnums=0).lower(state, batch, root).compile()
    sizes = update.memory_analysis()
    seconds = time.perf_counter() - began
    print(f"compiled in {seconds:.0f} s", flush=True)
    print(
        f"XLA: state {sizes.argument_size_in_bytes / 1e9:.2f} GB, activations and gradients "
        f"{sizes.temp_size_in_bytes / 1e9:.2f} GB",
        flush=True,
    )
    took = []
    for _ in range(STEPS):
        began, processor = time.perf_counter(), time.process_time()
        state, metrics = update(state, batch, root)
        loss = float(metrics["loss"])
        took.append((time.perf_counter() - began, time.process_time() - processor))
    wall, busy = min(took)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9 * 1024
    print(f"a step: {wall:.1f} s, {busy:.1f} s of processor time; peak {peak:.2f} GB; loss {loss:.3f}")


if __name__ == "__main__":
    main()
