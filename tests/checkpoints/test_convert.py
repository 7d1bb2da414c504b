"""Original files become a folder that makes what the original code made; parts that are missing or wrong are said."""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import draw_all, psnr, relative_error

import sora_jax
from sora_jax.checkpoints.convert import convert
from sora_jax.checkpoints.ltx_vae_weights import stored_shapes
from sora_jax.checkpoints.original_files import parts_in, read_parts
from sora_jax.errors import UserError
from sora_jax.models.ltx_vae_config import LTX_0_9_0, LTX_0_9_1, LTX_0_9_5, LTXVAEConfig
from sora_jax.models.ltx_weights import ltx_config, published_shapes
from sora_jax.models.tiles import decode_stream, encode_stream

GOLDEN = golden("wan_original")
LTX = golden("ltx_original")
FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.safetensors",
}


def weights(part: str) -> dict[str, np.ndarray]:
    """As the kit drew them: by the part's name and the tensor's."""
    names = [(f"{part}.{name}", shape) for name, shape in GOLDEN["names"][part]]
    return {name.removeprefix(f"{part}."): array for name, array in draw_all(names).items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    """A folder of the original code's kind."""
    folder = tmp_path_factory.mktemp("original") / "Wan2.1-T2V-tiny"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text(json.dumps(GOLDEN["tokenizer"]))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **GOLDEN["config"]}))
    for part, file in FILES.items():
        safetensors.numpy.save_file(weights(part), folder / file)
    return folder


@pytest.fixture(scope="module")
def converted(original) -> pathlib.Path:
    return convert([original], original.parent / "converted")


def test_a_converted_folder_makes_what_the_original_code_makes(converted):
    pipeline = sora_jax.load(converted, reference="original")
    own = GOLDEN["settings"]
    job = pipeline.request_job(
        own["prompt"],
        GOLDEN["noise"],
        negative=own["negative"],
        steps=own["steps"],
        guidance=own["guidance"],
        size=(16, 32),
        frames=5,
    )
    (latents,) = pipeline.sample_latents([job])
    assert relative_error(latents, GOLDEN["latents"]) < 1e-3
    frames = pipeline.decode_job(job, latents).whole().frames
    assert psnr(frames, (GOLDEN["frames"].transpose(1, 2, 3, 0) + 1) / 2) > 50
    encoded = np.concatenate(list(encode_stream(pipeline.vae, GOLDEN["clip"])))
    assert relative_error(encoded.transpose(3, 0, 1, 2), GOLDEN["encoded"]) < 1e-4
    decoded = np.concatenate(list(decode_stream(pipeline.vae, GOLDEN["latents"].transpose(1, 2, 3, 0))))
    assert relative_error(decoded.transpose(3, 0, 1, 2), GOLDEN["frames"]) < 1e-4


def test_names_and_types_are_diffusers_and_the_files_own(converted, original):
    index = json.loads((converted / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline" and "boundary_ratio" not in index
    written = safetensors.numpy.load_file(converted / "transformer" / FILES["transformer"])
    np.testing.assert_array_equal(written["proj_out.bias"], weights("transformer")["head.head.bias"])
    assert {path.name for path in converted.iterdir()} == {
        *("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")
    }
    with pytest.raises(UserError, match="is there already"):
        convert([original], converted)


def test_files_that_take_a_picture_become_an_image_to_video_folder(original, tmp_path):
    picture = weights("transformer")
    kernel = picture["patch_embedding.weight"]
    given = np.zeros((len(kernel), kernel.shape[1] + 4, *kernel.shape[2:]), np.float32)
    picture["patch_embedding.weight"] = np.concatenate([kernel, given], axis=1)
    for part in ("high_noise_model", "low_noise_model"):
        (tmp_path / part).mkdir()
        safetensors.numpy.save_file(picture, tmp_path / part / FILES["transformer"])
    rest = [original / FILES[part] for part in ("vae", "text_encoder")]
    words = original / "google" / "umt5-xxl"
    pair = [tmp_path / "high_noise_model", tmp_path / "low_noise_model"]
    folder = convert([*pair, *rest], tmp_path / "out", tokenizer=words)
    index = json.loads((folder / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"]) == ("WanImageToVideoPipeline", 0.9)


def test_other_parts_come_from_a_base(original, converted, tmp_path):
    """One transformer of ComfyUI's kind: with a prefix, in float8 with a scale beside each matrix."""
    scaled = {}
    for name, array in weights("transformer").items():
        name = f"model.diffusion_model.{name}"
        if array.ndim != 2:
            scaled[name] = array
            continue
        scale = np.float32(np.abs(array).max() / 448)
        scaled[name] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
        scaled[name.removesuffix("weight") + "scale_weight"] = scale[None]
    scaled["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(scaled, file := tmp_path / "wan_fp8_scaled.safetensors")
    folder = convert([file], tmp_path / "out", base=str(converted), dtype="float32")
    written = safetensors.numpy.load_file(folder / "transformer" / FILES["transformer"])
    wanted = weights("transformer")["blocks.1.ffn.0.weight"]
    error = np.abs(written["blocks.1.ffn.net.0.proj.weight"] - wanted).max()
    assert 0 < error < 0.05 * np.abs(wanted).max()
    assert (folder / "vae" / FILES["transformer"]).read_bytes() == (
        converted / "vae" / FILES["transformer"]
    ).read_bytes()
    assert sora_jax.load(folder).bundle.dit is not None


def test_two_transformers_are_told_by_their_names(original, tmp_path):
    for noise in ("high", "low"):
        safetensors.numpy.save_file(
            weights("transformer"), tmp_path / f"wan2.2_t2v_{noise}_noise.safetensors"
        )
    files = [original / FILES[part] for part in ("vae", "text_encoder")]
    pair = sorted(tmp_path.glob("*.safetensors"))
    tokenizer = original / "google" / "umt5-xxl"
    index = json.loads(
        (convert([*files, *pair], tmp_path / "out", tokenizer=tokenizer) / "model_index.json").read_text()
    )
    assert index["boundary_ratio"] == 0.875 and index["transformer_2"] == index["transformer"]
    pair[1] = pair[1].rename(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="don't say which in their names"):
        convert([*files, *pair], tmp_path / "more", tokenizer=tokenizer)


def ltx_tensors(version: str) -> dict[str, np.ndarray]:
    """Of the original's names and true shapes, without a number in memory."""
    names = {**dict(LTX["transformer"]), **dict(LTX[version])}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()}


@pytest.mark.parametrize(
    ("version", "config"), [("0_9_0", LTX_0_9_0), ("0_9_1", LTX_0_9_1), ("0_9_5", LTX_0_9_5)]
)
def test_both_parts_of_a_file_of_ltx_are_told_by_its_tensors(version, config):
    tensors = ltx_tensors(version)
    transformer, vae = parts_in(pathlib.Path("ltx"), tensors)
    assert LTXVAEConfig.read(vae.settings) == config
    assert {name: tensor.shape for name, tensor in vae.named.items()} == stored_shapes(config)
    own = ltx_config(transformer.settings)
    assert (own.layers, own.heads, own.head_width, own.channels) == (2, 32, 64, 128)
    assert {name: tensor.shape for name, tensor in transformer.named.items()} == dict(published_shapes(own))
    with pytest.raises(UserError, match=r"none of LTX-Video 0\.9\.0, 0\.9\.1"):
        parts_in(pathlib.Path("ltx"), {**tensors, "vae.decoder.more.weight": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ("transformer", "vae"),
            "hold no text_encoder and no tokenizer: name its file too, or a diffusers folder",
        ),
        (("transformer", "vae", "text_encoder"), "hold no tokenizer: name its folder with --tokenizer"),
        (("transformer", "transformer"), "both hold|say which"),
    ],
)
def test_what_is_missing_is_said(original, tmp_path, files, message):
    copies = []
    for number, part in enumerate(files):
        safetensors.numpy.save_file(weights(part), tmp_path / f"{number}.safetensors")
        copies.append(tmp_path / f"{number}.safetensors")
    with pytest.raises(UserError, match=message):
        convert(copies, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_other_models_are_refused(original, tmp_path):
    for name, message in (
        ("bert.pooler.weight", "no part of Wan or"),
        ("vace_blocks.0.after_proj.bias", "VACE"),
    ):
        safetensors.numpy.save_file({name: np.ones(2, np.float32)}, file := tmp_path / "file.safetensors")
        with pytest.raises(UserError, match=message):
            read_parts(file)
    cut = {name: array for name, array in weights("transformer").items() if name != "blocks.1.ffn.0.bias"}
    safetensors.numpy.save_file(cut, file)
    with pytest.raises(UserError, match=r"'blocks\.1\.ffn\.net\.0\.proj\.bias' is missing"):
        convert(
            [file], tmp_path / "out", base=str(write_folder(tmp_path / "base", golden("wan_pipeline_unipc")))
        )
    with pytest.raises(UserError, match="is a file, of a part of a model: `sora-jax convert`"):
        sora_jax.load(file)
    with pytest.raises(UserError, match=r"holds original files of a model, and no model_index\.json"):
        sora_jax.load(original)
