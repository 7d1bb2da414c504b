"""What an autoencoder's latents are like to a transformer that makes errors: see README.md, "Pictures".

    python experiments/efficiency/latents.py toyworld runs/vae

Noise is added to the latents of true validation clips, and the oracle reads shapes of what is decoded; `rough` is the
share of a latent's variance that is lost when it is averaged over 2×2 cells and spread out again.
"""

from __future__ import annotations

import json

import click
import jax
import numpy as np

from sora_jax.checkpoints.bundle import load_bundle, measure_latents
from sora_jax.evaluation.metrics import psnr
from sora_jax.media.video import Video
from sora_jax.models.tiles import decode_stream
from sora_jax.models.vae import VAE
from sora_jax.toyworld import oracle
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import Scene, WorldConfig

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
FPS = 8.0
WORLD = WorldConfig(objects=(1.0, 0.0, 0.0), two_shots=0.0)


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--clips", default=128, help="Of nine frames, 64 pixels.")
def main(models: tuple[str, ...], clips: int) -> None:
    """Reads shapes through the autoencoders of MODELS, under noise."""
    scenes = [sample_scene(0, index, "validation", 1.0, 1.0, WORLD) for index in range(clips)]
    true = [render(scene, 9, 64, 64, FPS) for scene in scenes]
    for name in models:
        vae = measure_latents(load_bundle(name).vae, true)
        click.echo(json.dumps({"model": name} | measure(vae, scenes, np.stack(true))))


def measure(vae: VAE, scenes: list[Scene], true: np.ndarray) -> dict[str, float]:
    """PSNR in dB, the share of shapes read right at each level of noise, and how rough latents are."""
    encode = jax.jit(lambda vae, clip: vae.to_latent(clip / 127.5 - 1.0))
    latents = [np.asarray(encode(vae, clip[None].astype(np.float32))) for clip in true]
    B, t, y, x, c = (everything := np.concatenate(latents)).shape
    cells = everything.reshape(B, t, y // 2, 2, x // 2, 2, c)
    rough = np.mean(np.square(cells - cells.mean((3, 5), keepdims=True))) / everything.var()
    result = {"rough": round(float(rough), 4)}
    for level in LEVELS:
        right, errors = [], []
        for number, (scene, latent) in enumerate(zip(scenes, latents, strict=True)):
            noise = level * np.random.default_rng(number).standard_normal(latent.shape, np.float32)
            pixels = np.concatenate(list(decode_stream(vae, (latent + noise)[0]))) * 127.5 + 127.5
            frames = np.round(pixels).astype(np.uint8)
            errors.append(10 ** (-float(psnr(frames, true[number])) / 10))
            right.append(oracle.score(oracle.read(Video(frames, FPS)), scene, ("shape",))["shape"])
        result |= {
            f"psnr at {level:g}": round(-10 * np.log10(np.mean(errors)), 2),
            f"shape at {level:g}": round(float(np.mean(right)), 3),
        }
    return result


if __name__ == "__main__":
    main()
