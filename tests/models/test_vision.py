"""CLIP's vision transformer and a transformer that sees its states: transformers' and diffusers' numbers."""

import dataclasses
import json

import numpy as np
import pytest
import wan_image_check
from helpers.diffusers_folder import GOLDEN
from seeded import draw

from sora_jax.errors import UserError
from sora_jax.models.vision import PREFIX, ClipVision, Preparation, load_clip_vision
from sora_jax.models.wan_weights import diffusers_names, wan_config

KEPT = {name: dict(np.load(GOLDEN / f"wan_image_{name}.npz")) for name in ("clip", "ends")}
LARGE = {"crop_size": {"height": 336, "width": 336}}
ENCODER = wan_image_check.encoder_of(KEPT["clip"])


@pytest.mark.parametrize("name", KEPT)
def test_states_and_velocity_are_the_originals(name):
    """Of one picture, and of two with a position for each state; pictures are scaled and cropped as Pillow does."""
    for part, error in wan_image_check.check(KEPT[name]).items():
        assert error < 1e-4, part


def test_published_files_have_a_prefix():
    npz = KEPT["clip"]
    names = json.loads(str(npz["names"]))["image_encoder"]
    tensors = {PREFIX + name: draw(name, shape) for name, shape in names}
    same = ClipVision(ENCODER.sizes, ENCODER.prepare, tensors, "")
    np.testing.assert_array_equal(same([npz["picture"]]), ENCODER([npz["picture"]]))
    del tensors[f"{PREFIX}pre_layrnorm.bias"]
    with pytest.raises(
        UserError, match=r"should have 'pre_layrnorm.bias' of shape \(16,\) and doesn't have it"
    ):
        ClipVision(ENCODER.sizes, ENCODER.prepare, tensors, "the file")


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 224, "width": 224}},
        {"do_center_crop": False},
        {"resample": 0},
        {"crop_size": {"height": 336, "width": 336}},
    ],
)
def test_pictures_prepared_otherwise_are_refused(settings):
    assert Preparation.of({}) == Preparation()
    with pytest.raises(UserError, match="aren't prepared as CLIP's"):
        Preparation.of(settings)


def test_squares_of_another_size_than_the_encoders_are_refused():
    with pytest.raises(UserError, match="is of pictures of 28 pixels, and 224 are cut out"):
        ClipVision(ENCODER.sizes, Preparation(), ENCODER._tensors, "the file")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        load_clip_vision(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match="holds a 'siglip'"):
        load_clip_vision(tmp_path, tmp_path)


def test_the_originals_names_are_known():
    theirs = {
        "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
        "img_emb.proj.3.bias": "condition_embedder.image_embedder.ff.net.2.bias",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "blocks.3.cross_attn.k_img.weight": "blocks.3.attn2.add_k_proj.weight",
        "blocks.3.cross_attn.norm_k_img.weight": "blocks.3.attn2.norm_added_k.weight",
    }
    assert list(diffusers_names(theirs | {"blocks.3.attn2.norm_added_q.weight": ""})) == list(theirs.values())


def test_widths_that_no_model_has_are_refused():
    config = json.loads(str(KEPT["clip"]["config"]))["transformer"]
    assert dataclasses.asdict(wan_config(config))["picture_width"] == 16
    for change in ({"added_kv_proj_dim": 40}, {"added_kv_proj_dim": None}, {"image_dim": None}):
        with pytest.raises(UserError, match="added_kv_proj_dim=.*isn't supported"):
            wan_config(config | change)
