"""Distillation: what is right has no loss, what doesn't fit is refused, and a run gives a model of few steps."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.tiny_run import tiny_config
from ml_collections import ConfigDict

from sora_jax.checkpoints.bundle import load_bundle, read_sampling, save_bundle
from sora_jax.checkpoints.components import Bundle, Sampling
from sora_jax.checkpoints.store import named_leaves
from sora_jax.config import component
from sora_jax.diffusion import flow
from sora_jax.distributed.mesh import WHOLE
from sora_jax.errors import UserError
from sora_jax.models.dit import DiT
from sora_jax.models.dit_config import DiTConfig
from sora_jax.pipeline.pipeline import load
from sora_jax.train import config_files
from sora_jax.train.__main__ import run
from sora_jax.train.distill import DistillObjective
from sora_jax.train.objectives import complete, make_objective


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny student's, whose teacher is in the same folder."""
    folder = tmp_path_factory.mktemp("distill")
    config = tiny_config(folder, 4)
    teacher = DiT(component(DiTConfig, config.dit, "dit"), rngs=nnx.Rngs(1))
    bundle = Bundle("teacher", load_bundle(folder / "vae").vae, teacher, base_tokens=config.flow.base_tokens)
    save_bundle(bundle, folder / "teacher", dtype="float32")
    config.update({"objective": "distill", "distill": {"teacher": str(folder / "teacher"), "guidance": 2.0}})
    config.dit.flow_map = True
    return config


def objective_of(config, folder: pathlib.Path) -> DistillObjective:
    return make_objective(complete(config), folder)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Line:
    """The flow of a single data point: straight from anywhere to `clean`."""

    clean: jax.Array

    def __call__(self, x, batch, sigma, next_sigma=None):
        return flow.velocity_at(x, self.clean, flow.gather_sigmas(sigma, batch.condition_ids)[..., None])


def test_a_right_flow_map_of_its_teacher_has_no_loss_and_a_wrong_one_has(config, tmp_path):
    objective = objective_of(config, tmp_path)
    batch = next(iter(objective.data(config, WHOLE)))
    one, other = Line(jnp.float32(0.3)), Line(jnp.float32(0.5))
    right, parts = objective.loss(one, batch, jax.random.key(0), one)
    assert float(right) < 1e-6 and max(map(float, parts.values())) < 1e-6
    _, parts = objective.loss(one, batch, jax.random.key(0), other)
    # The teacher is asked for short steps alone; long ones agree with the student's own halves.
    assert float(parts["short_error"]) > 1e-2 and float(parts["long_error"]) < 1e-6


def test_steps_are_drawn_inside_the_schedule_short_ones_for_the_teacher(config, tmp_path):
    objective = objective_of(config, tmp_path)
    short = jnp.array([[True], [False]])
    begin, end = map(np.asarray, objective._draw_steps(jax.random.key(0), short, (2, 4000)))
    assert (end >= 0).all() and (end <= begin).all() and (begin <= 1).all()
    length = begin - end
    assert length[0].max() <= 1 / 16 + 1e-6 and length[1].min() >= 1 / 16 - 1e-6 and length[1].max() > 0.9
    assert 0.2 < (begin[1] == 1).mean() < 0.3


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dit.layers": 3}, "config.dit.layers is 3 and the teacher"),
        ({"dit.flow_map": False}, "config.dit.flow_map=False"),
        ({"flow.base_tokens": 7.0}, "config.flow.base_tokens=7 is not the teacher's"),
        ({"pipeline.batch_size": 3}, "must be even"),
        ({"distill.teacher": "VAE"}, "has no transformer"),
        ({"distill.guidance": 0.5}, "config.distill.guidance=0.5"),
        ({"distill.shortest": 0.0}, "config.distill.shortest=0.0"),
        ({"flow.routing": 0.5}, "has no layers to skip"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(config, tmp_path, changes, words):
    teacher = pathlib.Path(config.distill.teacher)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {k: str(teacher.parent / "vae") if v == "VAE" else v for k, v in changes.items()}
    )
    with pytest.raises(UserError, match=words):
        objective_of(config, tmp_path).check()
    with pytest.raises(UserError, match=words):
        objective_of(config, tmp_path).init(jax.random.key(0))


@pytest.mark.parametrize("name", ["distill", "distill:debug"])
def test_the_shipped_configuration_fits_the_bundled_teacher(name, tmp_path):
    objective = objective_of(ConfigDict(config_files.load(name)), tmp_path)
    student = jax.eval_shape(objective.init, jax.random.key(0))
    shapes = lambda model: {name: leaf.shape for name, leaf in named_leaves(model).items()}
    assert shapes(objective.teacher.dit).items() < shapes(student).items()


@pytest.mark.slow  # test_debug runs the same parts
def test_a_run_gives_a_model_that_is_sampled_in_few_steps(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.log.update(heldout_every=4, heldout_batches=2, sheet_every=4)
    run(config, tmp_path / "turbo")
    pipeline = load(tmp_path / "turbo")
    sampling = pipeline.bundle.sampling
    assert (sampling.steps, sampling.guidance, sampling.distilled) == (4, 2.0, True)
    video = pipeline.generate("a red circle", duration=0.5, resolution=32)
    assert video.frames.shape == (4, 32, 32, 3)


@pytest.mark.slow
def test_a_distilled_model_has_its_own_defaults_and_says_what_it_cannot_follow(config, tmp_path):
    """Steps and guidance are the model's where nothing is asked for, known before it is loaded."""
    objective = objective_of(config, tmp_path)
    student = jax.tree.map(lambda leaf: leaf + 0.05, DiT(objective.dit, rngs=nnx.Rngs(2)))
    save_bundle(objective.bundle("turbo", objective.vae, student), tmp_path / "turbo")
    assert (read_sampling(tmp_path / "turbo"), read_sampling(config.distill.teacher)) == (
        Sampling(4, 2.0, True),
        Sampling(),
    )
    pipeline, notes = load(tmp_path / "turbo", lazy=True), []
    pipeline.notify = notes.append
    assert pipeline.defaults == {"steps": 4, "guidance": 1.0}
    options = {"duration": 0.2, "resolution": 32}
    plain, other = (
        pipeline.generate("a red circle", **options, **more).frames
        for more in ({}, {"guidance": 5.0, "solver": "heun"})
    )
    np.testing.assert_array_equal(plain, other)
    assert len([note for note in notes if "is distilled" in note]) == 1
    assert not np.array_equal(plain, pipeline.generate("a red circle", steps=1, **options).frames)


def test_a_bundle_may_name_the_model_whose_autoencoder_it_has(config, tmp_path):
    objective = objective_of(config, tmp_path)
    shared = load_bundle("toyworld").vae
    save_bundle(objective.bundle("turbo", shared), tmp_path / "turbo", vae_of="toyworld")
    assert not list((tmp_path / "turbo").glob("vae*"))
    again = load_bundle(tmp_path / "turbo")
    assert again.vae.config == shared.config and again.sampling.distilled
    for one, other in zip(jax.tree.leaves(again.vae), jax.tree.leaves(shared), strict=True):
        np.testing.assert_array_equal(one, other)
