"""Tests run on the CPU, compile quickly, and keep what was compiled for the next one, unless told otherwise."""

import os
import pathlib

import hypothesis
import pytest
from helpers.compiling import QUICKLY

TESTS = pathlib.Path(__file__).parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if QUICKLY.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()
# Before jax is imported, so that the processes that tests start inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".jax_cache"))
os.environ.setdefault("SORA_JAX_TEXT_STATES", "")  # a prompt's states are those of the test's own model
# Processes that tests start find this checkout's package, and tests/helpers.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)

from helpers import shape_checks  # noqa: E402

shape_checks.turn_on()

# Examples are drawn alike at every run in CI, and a busy machine is no failure.
hypothesis.settings.register_profile("sora_jax", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("sora_jax")

# Files whose tests take longest begin first, so that no worker is left with one of them at the end.
LONG = ("test_training.py", "test_sharding.py", "test_documents.py", "test_own_clips.py", "test_batching.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


# Linux lets a process have 65,530 memory mappings, of which each program that JAX compiles for CPUs takes some: a
# worker that runs half of the suite would come to the limit, where compiling ends the process.
MAX_MAPPINGS = 30_000


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """After each file: forgets what was compiled, where that takes many memory mappings."""
    yield
    try:
        mappings = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return
    if mappings > MAX_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A `FakePipeline` in place of each model that is loaded, whose names it notes; the folder is an empty one."""
    from helpers.fake_pipeline import FakePipeline

    from sora_jax.pipeline import pipeline

    model = FakePipeline()
    model.loads = []
    monkeypatch.setattr(pipeline, "load", lambda name, lazy: model.loads.append(name) or model)
    monkeypatch.chdir(tmp_path)
    return model
