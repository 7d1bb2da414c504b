"""At which noise levels does a transformer use its words? The question that explained direction at chance.

    python experiments/bundled_model/diagnose.py toyworld --clips 48

A true clip is noised to σ and its velocity predicted under every possible word for one attribute; the word with the
least error is the model's answer (a diffusion classifier: Li et al. 2023, arXiv:2303.16203). "gain" is how much lower
the error is under the right word than on average: what training can earn there by reading.
"""

from __future__ import annotations

import pathlib

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sora_jax
from sora_jax.diffusion import flow
from sora_jax.evaluation.report import ONE_THING
from sora_jax.models.dit import DiT
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.tokens.packing import PackedBatch, Segment, pack_batch
from sora_jax.tokens.patches import coordinates, patchify
from sora_jax.toyworld.render import render
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import COLOURS, DIRECTIONS, SHAPES, Thing

SIGMAS = (0.98, 0.95, 0.9, 0.8, 0.65, 0.5, 0.3)
WORDS = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS)}
FRAMES, SIDE, FPS = 17, 64, 8.0
TEXT = 24  # slots; prompts here are shorter


@click.command()
@click.argument("model", default="toyworld")
@click.option("--clips", default=48)
@click.option("--plot", type=click.Path(), default=str(pathlib.Path(__file__).parent / "words.png"))
def main(model: str, clips: int, plot: str) -> None:
    """Prints accuracy and gain by attribute and σ, and draws them."""
    pipeline = sora_jax.load(model)
    things, latents = true_clips(pipeline, clips)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for attribute, words in WORDS.items():
        errors = np.stack(
            [errors_by_word(pipeline, *clip, attribute) for clip in zip(things, latents, strict=True)]
        )
        right = np.array([words.index(getattr(thing, attribute)) for thing in things])
        own = np.take_along_axis(errors, right[:, None, None], axis=1)[:, 0]
        accuracy = np.mean(errors.argmin(1) == right[:, None], axis=0)
        gain = np.mean(errors.mean(1) - own, axis=0)
        for sigma, a, g in zip(SIGMAS, accuracy, gain, strict=True):
            click.echo(
                f"{attribute:9}  σ {sigma:.2f}  right {a:5.0%} (chance {1 / len(words):.0%})  gain {g:+.4f}"
            )
        for axis, values in zip(axes, (100 * accuracy, gain), strict=True):
            axis.plot(SIGMAS, values, "o-", label=attribute)
    axes[0].set(xlabel="σ", ylabel="right word found, %", ylim=(0, 103))
    axes[1].set(xlabel="σ", ylabel="error saved by the right word")
    axes[0].legend()
    figure.savefig(plot, dpi=120)


def true_clips(pipeline: Pipeline, count: int, frames: int = FRAMES) -> tuple[list[Thing], list[np.ndarray]]:
    """Things that move straight, one a clip, and the clips' latents."""
    things: list[Thing] = []
    latents = []
    encode = jax.jit(lambda vae, clip: vae.to_latent(clip.astype(jnp.float32)[None] / 127.5 - 1.0)[0])
    for index in range(count):
        scene = sample_scene(1, index, "validation", (frames - 1) / FPS, 1.0, ONE_THING)
        things.append(scene.shots[0].things[0])
        latents.append(np.asarray(encode(pipeline.vae, render(scene, frames, SIDE, SIDE, FPS))))
    return things, latents


def errors_by_word(pipeline: Pipeline, thing: Thing, latent: np.ndarray, attribute: str) -> np.ndarray:
    """Mean square error of the velocity under each word: [words, σ]."""
    config = pipeline.dit.config
    patches = patchify(latent, config.patch)
    coords = coordinates(latent.shape[:3], config.patch, fps=FPS, mode=config.coords)
    noise = np.random.default_rng(0).standard_normal(patches.shape).astype(np.float32)
    rows = []
    for word in WORDS[attribute]:
        said = {name: getattr(thing, name) for name in WORDS} | {attribute: word}
        article = "an" if said["colour"][0] in "aeiou" else "a"
        prompt = f"{article} {said['colour']} {said['shape']}"
        if latent.shape[0] > 1:  # a picture has no direction
            prompt += f" moves {said['direction'].replace('-', ' and ')}"
        [states] = pipeline.text_encoder.encode([prompt])
        everywhere, from_0 = np.ones(len(patches), np.float32), np.zeros(len(patches), np.float32)
        rows.append(Segment(patches, coords, everywhere, from_0, states, np.zeros(len(states), np.float32)))
    batches = [pack_batch([[run]], 1, len(patches), TEXT, 1)[0] for run in rows]
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    return np.stack([np.asarray(_errors(pipeline.dit, batch, noise, sigma)) for sigma in SIGMAS], axis=1)


@jax.jit
def _errors(dit: DiT, batch: PackedBatch, noise: jax.Array, sigma: jax.typing.ArrayLike) -> jax.Array:
    rows = batch.patches.shape[0]
    table = jnp.broadcast_to(jnp.array([0.0, 1.0]) * sigma, (rows, 2))
    predicted = dit(flow.interpolate(batch.patches, noise, jnp.asarray(sigma)), batch, table)
    return jnp.mean(jnp.square(predicted - flow.velocity(batch.patches, noise)), axis=(1, 2))


if __name__ == "__main__":
    main()
