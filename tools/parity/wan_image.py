"""Reference results of Wan's image-to-video pipelines, by diffusers: OUT/wan_image_VARIANT.npz.

    python tools/parity/wan_image.py OUT

"pair" is of Wan2.2-A14B's kind (two transformers, and two guidance scales), "clip" of Wan2.1-I2V's (an image encoder),
"ends" of Wan2.1-FLF2V's (which is given a last picture too).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from wan import PADDED, TEXT, TINY, VAE, WIDE, fill, scheduler, tokenizer, versions

CONFIG = TINY | {"in_channels": 12}  # 4 of the latent, 4 of the mask, 4 of the picture's latent
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}
STATES = 5  # of a picture
WIDE_VISION = VISION | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
}
WIDE_CONFIG = WIDE | {
    "num_attention_heads": 40,
    "in_channels": 36,
    "ffn_dim": 13_824,
    "num_layers": 1,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
SETTINGS: dict[str, Any] = {
    "prompt": "a red circle moves left",
    "negative_prompt": "blue square",
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
}


def main() -> None:
    """Writes every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--wide", action="store_true", help="true widths too: some minutes and 6 GB")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    second = diffusers.WanTransformer3DModel(**CONFIG)
    own = {"transformer_2": second, "boundary_ratio": 0.9, "image_encoder": None, "image_processor": None}
    names = {"transformer_2": fill(second, "second.")}
    write(out, "pair", CONFIG, own, names, guidance_scale_2=2.0)
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    names = {"image_encoder": fill(encoder)}
    side = VISION["image_size"]
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    own = {"image_encoder": encoder, "image_processor": processor}
    seeing = CONFIG | {"image_dim": 16, "added_kv_proj_dim": 48}
    write(out, "clip", seeing, own, names)
    write(out, "ends", seeing | {"pos_embed_seq_len": 2 * STATES}, own, names)
    if arguments.wide:
        write_wide(out / "wan_image_wide.npz")


def write(
    out: pathlib.Path,
    variant: str,
    config: dict[str, Any],
    own: dict[str, Any],
    names: dict[str, Any],
    **settings: Any,
) -> None:
    """A tiny pipeline, saved in OUT/image_VARIANT; its latents and frames for one noise and picture."""
    parts = {
        "transformer": diffusers.WanTransformer3DModel(**config),
        "vae": diffusers.AutoencoderKLWan(**VAE),
        "text_encoder": transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT)),
    }
    names = {part: fill(model) for part, model in parts.items()} | names
    pipeline = diffusers.WanImageToVideoPipeline(
        **parts, tokenizer=tokenizer(), scheduler=scheduler("unipc"), **own
    )
    folder = out / f"image_{variant}"
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = np.random.default_rng(3)
    picture = generator.integers(0, 256, (32, 48, 3), np.uint8)
    noise = generator.standard_normal((1, 4, 2, 4, 6), np.float32)
    last_picture = generator.integers(0, 256, (32, 48, 3), np.uint8)
    given = {"image": PIL.Image.fromarray(picture)}
    if variant == "ends":
        given["last_image"] = PIL.Image.fromarray(last_picture)
    settings = SETTINGS | settings
    arrays = {
        kind: np.asarray(
            pipeline(
                **settings,
                **given,
                latents=torch.from_numpy(noise),
                output_type=kind,
            ).frames
        )
        for kind in ("latent", "np")
    }
    beside = evaluate(pipeline, list(given.values()))
    parts |= {name: part for name, part in own.items() if isinstance(part, torch.nn.Module)}
    read = lambda name: json.loads((folder / name).read_text())
    files = {
        "model_index.json": read("model_index.json"),
        "scheduler": read("scheduler/scheduler_config.json"),
        "tokenizer": read("tokenizer/tokenizer.json"),
    }
    if "image_encoder" in parts:
        files["image_processor"] = read("image_processor/preprocessor_config.json")
    np.savez_compressed(
        out / f"wan_image_{variant}.npz",
        settings=json.dumps(settings),
        config=json.dumps({part: read(f"{part}/config.json") for part in parts}),
        files=json.dumps(files),
        names=json.dumps(names),
        versions=versions(),
        noise=noise,
        picture=picture,
        last_picture=last_picture,
        latents=arrays["latent"],
        frames=np.round(255 * arrays["np"]).astype(np.uint8),
        **beside,
    )


def write_wide(path: pathlib.Path) -> None:
    """What the networks of Wan2.1-I2V-14B's widths give: all layers of the image encoder, one of the transformer."""
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WIDE_VISION))
    names = {"image_encoder": fill(encoder)}
    processor = transformers.CLIPImageProcessor()
    picture = np.random.default_rng(3).integers(0, 256, (480, 832, 3), np.uint8)
    pixels = processor(images=PIL.Image.fromarray(picture), return_tensors="pt")
    states = encoder(**pixels, output_hidden_states=True).hidden_states[-2]
    del encoder
    transformer = diffusers.WanTransformer3DModel(**WIDE_CONFIG)
    names["transformer"] = fill(transformer)
    np.savez_compressed(
        path,
        config=json.dumps({"image_encoder": WIDE_VISION, "transformer": WIDE_CONFIG}),
        files=json.dumps({"image_processor": {}}),
        names=json.dumps(names),
        versions=versions(),
        picture=picture,
        last_picture=picture,
        **velocity_of(transformer, states),
    )


def evaluate(pipeline: Any, pictures: list[PIL.Image.Image]) -> dict[str, Any]:
    """What the networks give alone: the image encoder's states of the pictures, and a velocity."""
    if pipeline.image_encoder is None:
        return {}
    return velocity_of(pipeline.transformer, pipeline.encode_image(pictures))


def velocity_of(transformer: Any, states: torch.Tensor) -> dict[str, Any]:
    """One forward pass with pictures' states, and what it was given."""
    config = transformer.config
    generator = np.random.default_rng(4)
    latent = generator.standard_normal((1, config.in_channels, 3, 4, 6), np.float32)
    text = generator.standard_normal((1, 5, config.text_dim), np.float32)
    padded = np.pad(text, ((0, 0), (0, PADDED - text.shape[1]), (0, 0)))
    given = {"encoder_hidden_states_image": states, "return_dict": False}
    velocity = transformer(torch.from_numpy(latent), torch.tensor([750]), torch.from_numpy(padded), **given)[
        0
    ]
    return {"states": states.numpy(), "latent": latent, "text": text, "velocity": velocity.numpy()}


if __name__ == "__main__":
    main()
