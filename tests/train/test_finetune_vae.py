"""Training on top of a diffusers folder's autoencoder: PyTorch's gradients, what learns, exports."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusers_folder import GOLDEN
from helpers.parity import draw_all
from helpers.slow import rest_slow
from helpers.tiny_finetune import write_base
from seeded import draw

import sora_jax
from sora_jax.checkpoints import ltx_vae_weights, wan_vae_weights
from sora_jax.checkpoints.finetuned import export_run
from sora_jax.checkpoints.pretrained import load_vae
from sora_jax.checkpoints.store import load_params, named_leaves
from sora_jax.distributed.mesh import WHOLE
from sora_jax.errors import UserError
from sora_jax.train.__main__ import make_config, run
from sora_jax.train.loop import make_steps
from sora_jax.train.loop_config import read_loop_config
from sora_jax.train.objectives import make_objective

VERSIONS = {"wan_2_1": wan_vae_weights, "wan_2_2": wan_vae_weights, "ltx_0_9_5": ltx_vae_weights}
LOADERS = {"wan": wan_vae_weights.load_wan_vae, "ltx": ltx_vae_weights.load_ltx_vae}
LATENTS = {"wan_2_1": (2, 2, 3), "wan_2_2": (2, 2, 2), "ltx_0_9_5": (2, 2, 2)}


@functools.cache
def gradients() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vae_gradients.npz") as file:
        return dict(file)


def drawn(version: str):
    """The model that the kit had."""
    own = gradients()
    tensors = draw_all(json.loads(str(own[f"all_{version}"])))
    return LOADERS[version[:3]](json.loads(str(own[f"config_{version}"])), tensors)


@pytest.mark.parametrize("remat", rest_slow([False, True]))
@pytest.mark.parametrize("version", rest_slow(list(VERSIONS)))
def test_gradients_of_a_decoder_are_pytorchs(version, remat):
    own, model = gradients(), drawn(version)
    model.config = dataclasses.replace(model.config, remat=remat)
    extra = {"timestep_b": 0.05} if version.startswith("ltx") else {}
    latent = np.random.default_rng(3).standard_normal((*LATENTS[version], model.config.channels), np.float32)

    def loss(model):
        clip = model.decode(latent[None], **extra)
        target = np.random.default_rng(4).standard_normal(clip.shape[1:], np.float32)
        return jnp.mean(jnp.square(clip[0] - target))

    grads = named_leaves(jax.jit(jax.grad(loss))(model))
    theirs = VERSIONS[version].published_tensors(model.config, grads)
    names = json.loads(str(own[f"names_{version}"]))
    norms = np.array([np.linalg.norm(theirs[name]) for name, _ in names])
    along = np.array([np.vdot(theirs[name], draw(f"probe.{name}.bias", shape)) for name, shape in names])
    scale = own[f"norm_{version}"] + 1e-3 * own[f"norm_{version}"].max()
    assert (np.abs(norms - own[f"norm_{version}"]) / scale).max() < 1e-4
    assert (np.abs(along - own[f"along_{version}"]) / scale).max() < 1e-4


def tiny_config(place: pathlib.Path, steps: int, **changes: str):
    if not (place / "tiny-wan").exists():
        write_base(place / "tiny-wan", "wan")
    own = {
        "pretrained": str(place / "tiny-wan"),
        "steps": str(steps),
        "loss.crop": "5,16,16",
        "optim.lr": "0.01",
        "log.every": "1",
        "log.heldout_every": "0",
        "log.sheet_every": "0",
        "checkpoint.every": "2",
    }
    return make_config("finetune_vae:debug", own | {k.replace("__", "."): v for k, v in changes.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A run of four steps, and its export."""
    place = tmp_path_factory.mktemp("finetune_vae")
    run(tiny_config(place, 4), place / "run")
    export_run(place / "run", place / "out")
    return place


def test_the_decoder_alone_learns_and_its_loss_falls(place):
    before, after = (named_leaves(load_vae(place / name)) for name in ("tiny-wan", "out"))
    changed = {name.split("/")[0] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert all(row["flops_per_second"] > 0 for row in rows if "flops_per_second" in row)


@pytest.mark.slow
def test_a_decoder_learns_one_clip(place):
    objective = make_objective(tiny_config(place, 60), place / "objective")
    batches = iter(objective.data(None, WHOLE))
    batch = next(batches)
    batches.close()
    init, step = make_steps(objective, read_loop_config(tiny_config(place, 60)).optim)
    root = jax.random.key(0)
    state, step = jax.jit(init)(root, objective.initial), jax.jit(step, donate_argnums=0)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, root)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])


def test_an_export_is_the_runs_model_and_the_rest_is_the_bases(place):
    own, exported = (sora_jax.load(place / name) for name in ("run", "out"))
    for leaf, other in zip(jax.tree.leaves(own.vae), jax.tree.leaves(exported.vae), strict=True):
        np.testing.assert_array_equal(leaf, other)
    for part in ("transformer/config.json", "vae/config.json", "model_index.json"):
        assert (place / "out" / part).read_bytes() == (place / "tiny-wan" / part).read_bytes()
    learned = load_params(place / "run")
    np.testing.assert_array_equal(
        learned["decoder/conv_out/kernel"], named_leaves(own.vae)["decoder/conv_out/kernel"]
    )


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(place):
    run(tiny_config(place, 2), place / "stopped")
    run(tiny_config(place, 4), place / "stopped")
    for name, array in load_params(place / "run").items():
        np.testing.assert_array_equal(array, load_params(place / "stopped")[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__crop": "6,16,16"}, "6 frames can't be encoded: their number must be 1, 5, 9"),
        ({"loss__crop": "5,20,16"}, "20×16 pixels is no multiple of 8×8"),
        ({"pretrained": ""}, "config.pretrained is empty"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, message):
    objective = make_objective(tiny_config(tmp_path, 1, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=message):
        objective.check()


def test_another_base_is_refused(place, tmp_path):
    path = place / "run" / "base.json"
    kept = path.read_text()
    path.write_text(json.dumps({"vae": "other"}))
    try:
        with pytest.raises(UserError, match="holds another vae than the one"):
            sora_jax.load(place / "run")
    finally:
        path.write_text(kept)
