"""One case of ours: python ours.py CASE FOLDER DTYPE. See run.py."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time

from cases import DECODE, FIRST_STEP, FORWARD, GENERATE, GUIDANCE, PROMPT, QUEUE_STEPS, QUEUES, report, timed

BEGAN = time.perf_counter(), time.process_time()


def main(case: str, folder: str, dtype: str) -> None:
    """Prints seconds, processor seconds and the peak of memory."""
    import numpy as np

    import sora_jax

    generator = np.random.default_rng(0)
    if case in FORWARD:
        import jax
        from wan_check import segment, sigmas

        from sora_jax.checkpoints.diffusers_folder import read_json
        from sora_jax.checkpoints.pretrained import load_transformer
        from sora_jax.models.wan_weights import wan_config
        from sora_jax.tokens.packing import pack_batch

        config = wan_config(read_json(pathlib.Path(folder) / "transformer" / "config.json"), dtype=dtype)
        model = load_transformer(pathlib.Path(folder), config, weights=dtype)
        grid = FORWARD[case]
        latent = generator.standard_normal((*grid, config.channels), np.float32)
        text = generator.standard_normal((20, config.text_width), np.float32)
        batch, _ = pack_batch([[segment(latent, text)]], 1, int(np.prod(grid)) // 4, 32, 4)
        batch = jax.tree.map(jax.numpy.asarray, batch)
        sigma = jax.numpy.asarray(sigmas(batch))
        forward = jax.jit(lambda model, batch, sigma: model(batch.patches, batch, sigma))
        report(**timed(lambda: forward(model, batch, sigma).block_until_ready()))
    elif case == "decode":
        from sora_jax.checkpoints.pretrained import load_vae
        from sora_jax.models.tiles import decode_stream

        frames, height, width = DECODE
        vae = load_vae(pathlib.Path(folder), dtype)
        latent = generator.standard_normal((1 + frames // 4, height // 8, width // 8, 16), np.float32)
        report(**timed(lambda: list(decode_stream(vae, latent))))
    elif case in QUEUES:
        from sora_jax.models.text import TextConfig

        pipeline = sora_jax.load(folder, dtype=dtype, weights=dtype)
        text = TextConfig(kind="hash", width=pipeline.dit.config.text_width, max_tokens=24)
        pipeline = sora_jax.Pipeline(dataclasses.replace(pipeline.bundle, text=text))
        jobs = [
            pipeline.request_job(
                PROMPT, frames=frames, size=(height, width), steps=QUEUE_STEPS, guidance=GUIDANCE, seed=seed
            )
            for seed, (frames, height, width) in enumerate(QUEUES[case])
        ]
        report(**timed(lambda: pipeline.sample_latents(jobs), times=2))
    else:
        own = FIRST_STEP if case == "first-step" else GENERATE
        pipeline = sora_jax.load(folder, dtype=dtype, weights=dtype)
        job = pipeline.request_job(
            PROMPT,
            frames=own["frames"],
            size=(own["height"], own["width"]),
            steps=own["steps"],
            guidance=1.0 if case == "first-step" else GUIDANCE,
        )
        (latents,) = pipeline.sample_latents([job])
        if case == "generate":
            pipeline.decode_job(job, latents).whole()
        report(seconds=time.perf_counter() - BEGAN[0], processor=time.process_time() - BEGAN[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
