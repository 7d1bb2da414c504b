"""The original Wan code on drawn weights: a tiny text-to-video model, its files' names, latents and frames.

    python tools/parity/wan_original.py WAN OUT

Run it where PyTorch and diffusers are; WAN is a checkout of github.com/Wan-Video/Wan2.1 (Apache-2.0; made of commit
9737cba). Writes OUT/wan_original.npz. Its attention asks for a GPU, so PyTorch's stands in its place; autocast is left
out, so that all is float32. Head width, strides and depths of the autoencoder are the published ones.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
import types
from typing import Any

import numpy as np
import torch
from seeded import draw
from wan import PADDED, tokenizer, versions

TRANSFORMER: dict[str, Any] = {
    "in_dim": 16,
    "out_dim": 16,
    "dim": 128,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 16,
    "num_heads": 1,
    "num_layers": 2,
}
TEXT: dict[str, Any] = {
    "vocab": 64,
    "dim": 16,
    "dim_attn": 16,
    "dim_ffn": 24,
    "num_heads": 2,
    "num_layers": 2,
    "num_buckets": 32,
    "shared_pos": False,
}
SETTINGS = {"prompt": "a red circle moves left", "negative": "blue square", "steps": 4, "guidance": 5.0}
SHIFT = 5.0


def import_original(checkout: pathlib.Path) -> types.SimpleNamespace:
    """Its modules, without what their packages import besides."""
    for name in ("wan", "wan.modules", "wan.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    cleaner = types.ModuleType("wan.modules.tokenizers")
    cleaner.HuggingfaceTokenizer = None  # type: ignore[attr-defined]
    sys.modules["wan.modules.tokenizers"] = cleaner
    torch.cuda.current_device = lambda: "cpu"
    from wan.modules import model, t5, vae
    from wan.utils import fm_solvers_unipc

    def attention(q: Any, k: Any, v: Any, k_lens: Any = None, **_: Any) -> Any:
        count = k.shape[1] if k_lens is None else int(k_lens[0])
        q, k, v = (each.transpose(1, 2) for each in (q, k[:, :count], v[:, :count]))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    model.flash_attention = attention
    return types.SimpleNamespace(model=model, t5=t5, vae=vae, solver=fm_solvers_unipc)


def fill(model: torch.nn.Module, prefix: str) -> list[tuple[str, list[int]]]:
    """Draws every weight, as of a name with that prefix: what was drawn for another part is another number."""
    names = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    model.load_state_dict({name: torch.from_numpy(draw(prefix + name, shape)) for name, shape in names})
    model.eval()
    return names


@torch.no_grad()
def run(original: types.SimpleNamespace) -> dict[str, Any]:
    transformer = original.model.WanModel(**TRANSFORMER)
    vae = original.vae.WanVAE_(
        dim=8, z_dim=16, num_res_blocks=2, attn_scales=[], temperal_downsample=[False, True, True]
    )
    text = original.t5.T5Encoder(**TEXT)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text}
    names = {name: fill(part, f"{name}.") for name, part in parts.items()}
    words = tokenizer()

    def states(prompt: str) -> torch.Tensor:
        ids = torch.tensor([words(prompt).input_ids])
        filled = torch.nn.functional.pad(ids, (0, PADDED - ids.shape[1]))
        return text(filled, (torch.arange(PADDED) < ids.shape[1])[None].long())[0, : ids.shape[1]]

    noise = np.random.default_rng(1).standard_normal((16, 2, 2, 4), np.float32)
    context, without = states(SETTINGS["prompt"]), states(SETTINGS["negative"])
    latents, tokens = torch.from_numpy(noise), math.prod(noise.shape[1:]) // 4
    scheduler = original.solver.FlowUniPCMultistepScheduler(
        num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
    )
    scheduler.set_timesteps(SETTINGS["steps"], device="cpu", shift=SHIFT)
    velocity = None
    for t in scheduler.timesteps:
        one, other = (
            transformer([latents], t=t[None], context=[each], seq_len=tokens)[0]
            for each in (context, without)
        )
        velocity = one if velocity is None else velocity
        guided = other + SETTINGS["guidance"] * (one - other)
        latents = scheduler.step(guided[None], t, latents[None], return_dict=False)[0][0]
    mean, std = (torch.tensor(values) for values in statistics(original))
    frames = vae.decode(latents[None], [mean, 1 / std]).clamp(-1, 1)[0]
    clip = np.random.default_rng(2).integers(0, 256, (5, 16, 24, 3), np.uint8)
    pixels = torch.from_numpy(clip.astype(np.float32) / np.float32(127.5) - 1).permute(3, 0, 1, 2)
    encoded = vae.encode(pixels[None], [mean, 1 / std])[0]
    assert velocity is not None
    return {
        "names": json.dumps(names),
        "config": json.dumps(TRANSFORMER),
        "settings": json.dumps(SETTINGS),
        "tokenizer": words.backend_tokenizer.to_str(),
        "versions": versions(),
        "noise": noise,
        "sigmas": scheduler.sigmas.numpy(),
        "states": context.numpy(),
        "velocity": velocity.numpy(),
        "latents": latents.numpy(),
        "frames": frames.numpy(),
        "clip": clip,
        "encoded": encoded.numpy(),
    }


def statistics(original: types.SimpleNamespace) -> tuple[list[float], list[float]]:
    """Mean and deviation of latents, which the original's class sets beside its network."""
    made: dict[str, Any] = {}
    build, original.vae._video_vae = original.vae._video_vae, lambda **_: torch.nn.Identity()
    try:
        made = vars(original.vae.WanVAE(device="cpu"))
    finally:
        original.vae._video_vae = build
    return made["mean"].tolist(), made["std"].tolist()


if __name__ == "__main__":
    checkout, out = map(pathlib.Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    arrays = run(import_original(checkout))
    np.savez_compressed(out / "wan_original.npz", **arrays)
    print(
        {name: (array.shape, float(array.std())) for name, array in arrays.items() if hasattr(array, "std")}
    )
