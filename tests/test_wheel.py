"""The wheel has all that a user needs: installed into a fresh environment, it generates a video from any folder."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(*command: str | pathlib.Path, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from the files that git knows; setuptools comes by pip's own build environment."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("experiments/", "docs/", "tests/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", folder, folder / "source")
    [built] = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_the_packages_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        "sora_jax/py.typed",
        *(f"sora_jax/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.py")),
    }
    bundled = {file.relative_to(ROOT).as_posix() for file in (ROOT / "sora_jax/bundled").glob("*/*")}
    files = ("README.md", "config.json", "dit.safetensors", "vae.safetensors")
    assert bundled >= {f"sora_jax/bundled/toyworld/{file}" for file in files}
    wanted |= bundled
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "sora_jax").rglob("*.py")}
    assert not sorted(wanted - names)
    assert not [name for name in names if not name.startswith(("sora_jax/", "sora_jax-"))]


@pytest.mark.slow
def test_an_installed_wheel_generates_a_video(wheel, tmp_path):
    """The environment's other packages are this one's, by a .pth file, so nothing is downloaded."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    # Without the tests' PYTHONPATH: pip would find this checkout there and take sora_jax as installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = ("install", "--no-deps", "--no-index", "--quiet", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, env=environment)
    # After sora_jax: a checkout that is installed here stands behind it.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    (tmp_path / "empty").mkdir()
    options = {
        "cwd": tmp_path / "empty",
        "env": environment | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    }
    where = run(python, "-c", "import sora_jax; print(sora_jax.__file__)", **options).strip()
    assert pathlib.Path(where).is_relative_to(site)
    command = tmp_path / "venv" / "bin" / "sora-jax"
    prompt = "a red circle moves left"
    run(command, "generate", prompt, "--duration=0.5", "--steps=2", "--output=a.mp4", **options)
    assert (tmp_path / "empty" / "a.mp4").stat().st_size > 500
    assert "toyworld_dit" in run(command, "train", "--help", **options)
