"""Tests run on the CPU, and what XLA compiled for one is kept for the next: both unless told otherwise."""

import os
import pathlib

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Before jax is imported, so that the processes that tests start inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))

# Examples are drawn alike at every run in CI, and a busy machine is no failure.
hypothesis.settings.register_profile("sora_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("sora_jax")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A `FakeStudio` in place of each model that is loaded, whose names it notes; the folder is an empty one."""
    from helpers.fake_studio import FakeStudio

    from sora_jax.pipeline import pipeline

    model = FakeStudio()
    model.loads = []
    monkeypatch.setattr(pipeline, "load", lambda name, lazy: model.loads.append(name) or model)
    monkeypatch.chdir(tmp_path)
    return model
