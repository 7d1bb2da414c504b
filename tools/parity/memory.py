"""Memory and processor time of one forward pass by a transformer in true shapes, made by true_shapes.py.

    python tools/parity/memory.py FOLDER [--weights int8] [--offload] [--tokens 1280] [--velocity OUT.npy]

Float32 arithmetic. Prints the process's peak after loading and after each of two passes; with the velocity of two runs
their errors can be compared.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import time

import jax
import numpy as np
from wan_check import segment, sigmas

from sora_jax.checkpoints.diffusers_folder import read_json
from sora_jax.checkpoints.pretrained import STORED, load_transformer
from sora_jax.models.wan_weights import wan_config
from sora_jax.tokens.packing import pack_batch

GRIDS = {256: (4, 16, 16), 1280: (5, 32, 32)}  # latent cells, two by two a token


def main() -> None:
    """Loads, and computes twice: the first time compiles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--weights", choices=STORED, default="float32")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--tokens", type=int, choices=GRIDS, default=256)
    parser.add_argument("--velocity", type=pathlib.Path)
    given = parser.parse_args()
    config = wan_config(read_json(given.folder / "transformer" / "config.json"), dtype="float32")
    began = time.process_time()
    model = load_transformer(given.folder, config, (), given.weights, offload=given.offload)
    report("loaded", began)
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((*GRIDS[given.tokens], config.channels), np.float32)
    text = generator.standard_normal((20, config.text_width), np.float32)
    batch, _ = pack_batch([[segment(latent, text)]], 1, given.tokens, 32, 4)
    call = lambda model, batch, sigma: model(batch.patches, batch, sigma)
    forward = call if given.offload else jax.jit(call)
    for _ in range(2):
        began = time.process_time()
        velocity = np.asarray(forward(model, batch, sigmas(batch)))
        report("forward", began)
    if given.velocity:
        np.save(given.velocity, velocity)


def report(what: str, began: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.process_time() - began:.1f} s of processor time, peak {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
