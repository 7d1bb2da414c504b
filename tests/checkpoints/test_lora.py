"""LoRA files: PEFT's gives what diffusers gives with it, other spellings mean the same, and others' are refused."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.diffusers_folder import golden, write_folder
from helpers.parity import draw_all, relative_error

import sora_jax
from sora_jax.checkpoints.lora import merge_loras
from sora_jax.errors import UserError
from sora_jax.models.wan_weights import PUBLISHED_WAN, diffusers_names, wan_config
from sora_jax.tokens.canvas import all_noise_canvas, to_segment
from sora_jax.tokens.packing import pack_batch, unpack
from sora_jax.tokens.patches import patchify, unpatchify
from sora_jax.tokens.spans import CausalSpan

GOLDEN = golden("wan_lora")
CONFIG = wan_config(GOLDEN["config"])
TENSORS = draw_all(GOLDEN["names"])
TO_OLD = {"attn1.to_out.0": "self_attn.o", "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0"}
TO_OLD |= {"ffn.net.2": "ffn.2"}
TO_OLD |= {f"attn{n}.to_{p}": f"{kind}_attn.{p}" for n, kind in ((1, "self"), (2, "cross")) for p in "qkv"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "peft.safetensors"
    path.write_bytes(GOLDEN["lora"].tobytes())
    return path


def old(name: str) -> str:
    for ours, theirs in TO_OLD.items():
        name = name.replace(ours, theirs)
    return name


def respelled(file, spelling: str) -> dict[str, np.ndarray]:
    """The file's tensors as other programs name them; alpha is a tensor there."""
    out = {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        module, matrix = re.fullmatch(r"transformer\.(.*)\.lora_([AB])\.weight", name).groups()
        half = {"A": "lora_down", "B": "lora_up"}[matrix]
        if spelling == "lightx2v":
            module = f"diffusion_model.{old(module)}"
        elif spelling == "kohya":
            module = "lora_unet_" + old(module).replace(".", "_")
        elif spelling == "kohya, new names":
            module = "lora_unet_" + module.replace(".", "_")
        out |= {
            f"{module}.{half}.weight": np.ascontiguousarray(tensor),
            f"{module}.alpha": np.array(8, np.float32),
        }
    return out


def velocity(tensors) -> np.ndarray:
    latent = GOLDEN["latent"][0].transpose(1, 2, 3, 0)
    canvas = all_noise_canvas(CausalSpan(0, 9), (4, 6), 4, 16.0)
    text = GOLDEN["text"][0]
    one = to_segment(canvas, CONFIG.patch, text, np.zeros(len(text), np.float32), CONFIG.coords)
    batch, (place,) = pack_batch([[one]], 1, 18, 8, 1)
    x = patchify(latent, CONFIG.patch)[None]
    sigma = np.array([[0, 0.75]], np.float32)
    (tokens,) = unpack(jax.jit(PUBLISHED_WAN.load(CONFIG, tensors))(x, batch, sigma), [place])
    return unpatchify(tokens, latent.shape[:3], CONFIG.patch).transpose(3, 0, 1, 2)


def test_pefts_file_gives_what_diffusers_gives(file):
    merged = merge_loras(TENSORS, [(str(file), 1.0)], diffusers_names)
    assert relative_error(velocity(merged), GOLDEN["velocity"][0]) < 1e-4
    assert relative_error(velocity(TENSORS), GOLDEN["velocity"][0]) > 0.1


@pytest.mark.parametrize("spelling", ["lightx2v", "kohya", "kohya, new names"])
def test_other_spellings_mean_the_same(file, tmp_path, spelling):
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(respelled(file, spelling), other)
    wanted = merge_loras(TENSORS, [(str(file), 1.0)], diffusers_names)
    got = merge_loras(TENSORS, [(str(other), 1.0)], diffusers_names)
    for name in TENSORS:
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-6, err_msg=name)


def test_loras_are_scaled_and_add_up(file):
    twice = merge_loras(TENSORS, [(str(file), 0.5), (str(file), 1.5)], diffusers_names)
    name = "blocks.1.attn2.to_v.weight"
    once = merge_loras(TENSORS, [(str(file), 1.0)], diffusers_names)[name] - TENSORS[name]
    np.testing.assert_allclose(twice[name] - TENSORS[name], 2 * once, atol=1e-5)
    np.testing.assert_array_equal(twice["proj_out.weight"], TENSORS["proj_out.weight"])


def test_whole_differences_are_added(tmp_path):
    path = tmp_path / "diff.safetensors"
    difference = np.ones((48, 48), np.float32), np.full(48, 2, np.float32)
    keys = ("diffusion_model.blocks.0.self_attn.q.diff", "diffusion_model.blocks.0.self_attn.q.diff_b")
    safetensors.numpy.save_file(dict(zip(keys, difference, strict=True)), path)
    merged = merge_loras(TENSORS, [(str(path), 0.5)], diffusers_names)
    for part, added in (("weight", 0.5), ("bias", 1.0)):
        name = f"blocks.0.attn1.to_q.{part}"
        np.testing.assert_allclose(merged[name] - TENSORS[name], added, atol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"transformer.single_blocks.0.linear1.lora_A.weight": (4, 48)}, "for another model: it changes"),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 48)}, "only half of the update"),
        (
            {
                f"transformer.blocks.0.attn1.to_q.lora_{m}.weight": s
                for m, s in (("A", (4, 64)), ("B", (64, 4)))
            },
            r"its update of 'blocks.0.attn1.to_q.weight' is \(64, 64\) and that is \(48, 48\)",
        ),
        (
            {
                f"transformer.blocks.0.attn1.to_q.lora_{m}.weight": s
                for m, s in (("A", (4, 48)), ("B", (48, 8)))
            },
            "of different ranks",
        ),
        (
            {"transformer.blocks.0.attn1.to_q.lora_magnitude_vector": (48,)},
            "no part of a LoRA that can be merged",
        ),
    ],
)
def test_loras_of_other_models_are_refused(tmp_path, tensors, sentence):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, path)
    with pytest.raises(UserError, match=sentence):
        merge_loras(TENSORS, [(str(path), 1.0)], diffusers_names)


def test_a_lora_is_merged_where_a_model_is_loaded(file, tmp_path):
    folder = write_folder(tmp_path / "tiny", golden("wan_pipeline_unipc"))
    plain, styled = (sora_jax.load(folder, lora=lora).dit for lora in ((), [(str(file), 0.5)]))
    moved = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: abs(a - b).max(), plain, styled)
        )
        if leaf > 0
    }
    assert len(moved) == 7 and all("kernel" in name and "blocks" in name for name in moved), json.dumps(
        sorted(moved)
    )
    with pytest.raises(UserError, match="LoRA files are for diffusers pipelines"):
        sora_jax.load("toyworld", lora=str(file))
