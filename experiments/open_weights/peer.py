"""One case of diffusers: python peer.py CASE FOLDER DTYPE, where PyTorch and diffusers are. See run.py."""

from __future__ import annotations

import sys
import time

from cases import DECODE, FIRST_STEP, FORWARD, GENERATE, GUIDANCE, PROMPT, QUEUE_STEPS, QUEUES, report, timed

BEGAN = time.perf_counter(), time.process_time()
PADDED = 512


def main(case: str, folder: str, dtype: str) -> None:
    """Prints seconds, processor seconds and the peak of memory."""
    import diffusers
    import numpy as np
    import torch

    torch.set_grad_enabled(False)
    kind = getattr(torch, dtype)
    generator = np.random.default_rng(0)
    draw = lambda *shape: torch.from_numpy(generator.standard_normal(shape, np.float32)).to(kind)
    if case in FORWARD:
        model = diffusers.WanTransformer3DModel.from_pretrained(f"{folder}/transformer", torch_dtype=kind)
        time_, height, width = FORWARD[case]
        x, text = draw(1, 16, time_, height, width), draw(1, PADDED, model.config.text_dim)
        text[:, 20:] = 0
        step = torch.tensor([750])
        report(**timed(lambda: model(x, step, text, return_dict=False)))
    elif case == "decode":
        frames, height, width = DECODE
        vae = diffusers.AutoencoderKLWan.from_pretrained(f"{folder}/vae", torch_dtype=kind)
        latent = draw(1, 16, 1 + frames // 4, height // 8, width // 8)
        report(**timed(lambda: vae.decode(latent)))
    elif case in QUEUES:
        parts = {
            "transformer": diffusers.WanTransformer3DModel.from_pretrained(
                f"{folder}/transformer", torch_dtype=kind
            ),
            "vae": diffusers.AutoencoderKLWan.from_pretrained(f"{folder}/vae"),
            "scheduler": diffusers.UniPCMultistepScheduler.from_pretrained(f"{folder}/scheduler"),
            "text_encoder": None,
            "tokenizer": None,
        }
        pipeline = diffusers.WanPipeline(**parts)
        pipeline.set_progress_bar_config(disable=True)
        text = draw(1, PADDED, parts["transformer"].config.text_dim)
        text[:, 20:] = 0

        def one_after_another() -> None:
            for frames, height, width in QUEUES[case]:
                pipeline(
                    prompt_embeds=text,
                    negative_prompt_embeds=text,
                    num_frames=frames,
                    height=height,
                    width=width,
                    num_inference_steps=QUEUE_STEPS,
                    guidance_scale=GUIDANCE,
                    output_type="latent",
                )

        report(**timed(one_after_another, times=2))
    else:
        own = FIRST_STEP if case == "first-step" else GENERATE
        pipeline = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=kind)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(
            PROMPT,
            num_frames=own["frames"],
            height=own["height"],
            width=own["width"],
            num_inference_steps=own["steps"],
            guidance_scale=1.0 if case == "first-step" else GUIDANCE,
            output_type="latent" if case == "first-step" else "np",
        )
        report(seconds=time.perf_counter() - BEGAN[0], processor=time.process_time() - BEGAN[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
