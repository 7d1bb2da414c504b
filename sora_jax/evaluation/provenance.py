"""What made a figure."""

from __future__ import annotations

import pathlib
import subprocess
from typing import Any

import jax

from sora_jax.backend import __version__


def made_by() -> dict[str, Any]:
    """What made a figure: versions, the device, and the commit where the package lies in a git checkout."""
    folder = pathlib.Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else a checkout around an installed package
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "sora_jax": __version__,
        "commit": commit,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
