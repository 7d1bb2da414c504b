"""Reference results of Wan's transformer and of a whole tiny pipeline, by diffusers: OUT/wan_VARIANT.npz.

    python tools/parity/wan.py OUT [--wide]

Run by an environment with torch, diffusers and transformers (`make parity`); weights are `draw`'s.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import diffusers
import numpy as np
import peft
import PIL.Image
import tokenizers
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from seeded import draw

TINY: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
WIDE = TINY | {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "rope_max_seq_len": 1024,
}
PADDED = 512
VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.8, 1.1, 2.0],
}
# Of TI2V-5B's kind: 48 channels, pixel patches, shortcuts that average and repeat.
VAE_22: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.05 * (i % 5 - 2) for i in range(48)],
    "latents_std": [0.8 + 0.1 * (i % 4) for i in range(48)],
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
WORDS = ["a", "red", "circle", "moves", "left", "blue", "square", "slowly", "turns"]


def main() -> None:
    """Writes every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--wide", action="store_true", help="true widths too: some minutes and 4 GB")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    variants = {"tiny": TINY} | ({"wide": WIDE} if arguments.wide else {})
    for name, config in variants.items():
        write_transformer(arguments.out / f"wan_{name}.npz", config)
    write_lora(arguments.out / "wan_lora.npz", arguments.out / "lora")
    write_solvers(arguments.out / "wan_solvers.npz")
    for solver in ("unipc", "euler"):
        write_pipeline(
            arguments.out / f"wan_pipeline_{solver}.npz", arguments.out / f"pipeline_{solver}", solver
        )


def fill(model: torch.nn.Module, prefix: str = "") -> list[tuple[str, list[int]]]:
    """Draws every weight of a model, as of a name with that prefix; returns names and shapes."""
    state = {
        name: torch.from_numpy(draw(prefix + name, tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    model.eval()
    return [(name, list(value.shape)) for name, value in state.items()]


def versions() -> str:
    """Of what made a file."""
    modules = (diffusers, transformers, torch, np)
    return json.dumps({module.__name__: module.__version__ for module in modules})


def write_transformer(path: pathlib.Path, config: dict[str, Any]) -> None:
    """One forward pass with a timestep for all, one with a timestep a token, one in bfloat16."""
    model = diffusers.WanTransformer3DModel(**config)
    names = fill(model)
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((1, config["in_channels"], 3, 4, 6), np.float32)
    text = generator.standard_normal((1, 5, config["text_dim"]), np.float32)
    padded = torch.from_numpy(np.pad(text, ((0, 0), (0, PADDED - text.shape[1]), (0, 0))))
    x = torch.from_numpy(latent)
    timestep = torch.tensor([750])
    by_token = np.full((1, 18), 750, np.int64)
    by_token[:, :6] = 0  # the first frame is given
    call = lambda model, x, text, t: model(x, t, text, return_dict=False)[0].float().numpy()
    arrays = {
        "latent": latent,
        "text": text,
        "velocity": call(model, x, padded, timestep),
        "velocity_by_token": call(model, x, padded, torch.from_numpy(by_token)),
    }
    arrays["velocity_bfloat16"] = call(bfloat16(model), x.bfloat16(), padded.bfloat16(), timestep)
    np.savez_compressed(
        path, config=json.dumps(config), names=json.dumps(names), versions=versions(), **arrays
    )


def write_lora(path: pathlib.Path, folder: pathlib.Path) -> None:
    """A LoRA that PEFT made, as diffusers saves it, and the velocity with it."""
    model = diffusers.WanTransformer3DModel(**TINY)
    names = fill(model)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.from_numpy(draw(name, tuple(value.shape)))
    layers = peft.get_peft_model_state_dict(model)
    metadata = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    diffusers.WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, **metadata)
    generator = np.random.default_rng(0)
    latent = generator.standard_normal((1, 4, 3, 4, 6), np.float32)
    text = generator.standard_normal((1, 5, 16), np.float32)
    padded = torch.from_numpy(np.pad(text, ((0, 0), (0, PADDED - 5), (0, 0))))
    velocity = model(torch.from_numpy(latent), torch.tensor([750]), padded, return_dict=False)[0].numpy()
    lora = np.frombuffer((folder / "pytorch_lora_weights.safetensors").read_bytes(), np.uint8)
    np.savez_compressed(
        path,
        config=json.dumps(TINY),
        names=json.dumps(names),
        versions=versions(),
        lora=lora,
        latent=latent,
        text=text,
        velocity=velocity,
    )


def bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    """As `from_pretrained(torch_dtype=torch.bfloat16)` leaves it: norms, tables and the time embedder in float32."""
    kept = model._keep_in_fp32_modules
    for name, value in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            value.data = value.data.bfloat16()
    return model


def scheduler(solver: str, shift: float = 3.0) -> Any:
    """One of those that Wan's checkpoints come with."""
    if solver == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def write_solvers(path: pathlib.Path) -> None:
    """The way of a number under a velocity that is known, for several counts of steps."""
    arrays = {}
    for solver in ("unipc", "euler"):
        for steps in (1, 2, 3, 8, 20):
            own = scheduler(solver)
            own.set_timesteps(steps)
            x = torch.linspace(-2, 2, 8)[None, None, None, None]
            way = [x.numpy()]
            for sigma, t in zip(own.sigmas, own.timesteps, strict=False):
                velocity = torch.sin(3 * x) + float(sigma) * x  # as in tests/diffusion/test_solvers.py
                x = own.step(velocity, t, x, return_dict=False)[0]
                way.append(x.numpy())
            arrays |= {
                f"{solver}_{steps}_sigmas": own.sigmas.numpy(),
                f"{solver}_{steps}": np.stack(way).reshape(-1, 8),
            }
    np.savez_compressed(path, versions=versions(), **arrays)


def tokenizer() -> Any:
    """Of few words, with the end token that T5's have."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(f"▁{word}", -2.0) for word in WORDS]
    raw = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_pipeline(
    path: pathlib.Path, folder: pathlib.Path, solver: str, given: bool = False, pair: bool = False
) -> None:
    """A tiny pipeline, saved by `save_pretrained` in a folder; its latents and frames for one noise.

    Args:
      given: a pipeline of TI2V-5B's kind, whose first frame is a picture.
      pair: one of A14B's kind, with another transformer for low noise.
    """
    transformer = diffusers.WanTransformer3DModel(
        **TINY | ({"in_channels": 48, "out_channels": 48} if given else {})
    )
    vae = diffusers.AutoencoderKLWan(**(VAE_22 if given else VAE))
    text = transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT))
    names = {part: fill(model) for part, model in (("transformer", transformer), ("vae", vae))}
    names["text_encoder"] = fill(text)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer(),
        "scheduler": scheduler(solver),
        "expand_timesteps": given,
    }
    if pair:
        parts |= {"transformer_2": diffusers.WanTransformer3DModel(**TINY), "boundary_ratio": 0.875}
        names["transformer_2"] = fill(parts["transformer_2"], "second.")
    pipeline = diffusers.WanPipeline(**parts)
    pipeline.save_pretrained(folder)
    picture = np.random.default_rng(2).integers(0, 256, (32, 64, 3), np.uint8)
    own = {"image": PIL.Image.fromarray(picture)} if given else {}
    if given:
        pipeline = diffusers.WanImageToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(1).standard_normal(
        (1, vae.config.z_dim, 3, *((2, 4) if given else (4, 6))), np.float32
    )
    settings = {
        "prompt": "a red circle moves left",
        "negative_prompt": "blue square",
        "height": 32,
        "width": 64 if given else 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
    }
    arrays = {
        kind: np.asarray(
            pipeline(**settings, **own, latents=torch.from_numpy(noise), output_type=kind).frames
        )
        for kind in ("latent", "np")
    }
    configs = {
        part: json.loads((folder / part / "config.json").read_text())
        for part in ("transformer", "vae", "text_encoder")
    }
    files = {
        "model_index.json": json.loads((folder / "model_index.json").read_text()),
        "scheduler": json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        "tokenizer": json.loads((folder / "tokenizer" / "tokenizer.json").read_text()),
    }
    np.savez_compressed(
        path,
        settings=json.dumps(settings),
        config=json.dumps(configs),
        files=json.dumps(files),
        names=json.dumps(names),
        versions=versions(),
        sigmas=pipeline.scheduler.sigmas.numpy(),
        noise=noise,
        picture=picture,
        latents=arrays["latent"],
        frames=arrays["np"],
    )


if __name__ == "__main__":
    main()
