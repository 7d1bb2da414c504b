"""Which published weights a training run began with."""

from __future__ import annotations

import json
import pathlib

import jax

from sora_jax.checkpoints.diffusers_folder import WEIGHTS
from sora_jax.errors import UserError, atomic_path
from sora_jax.media.digests import array_digest, value_digest
from sora_jax.models.weights import map_weights


def weights_digest(folder: pathlib.Path, part: str = "transformer") -> str:
    """Names a part's weights by names, shapes and the first numbers of each: reading all takes minutes.

    Raises:
      UserError: the files are missing or damaged.
    """
    tensors = map_weights(folder / part / WEIGHTS)
    first = array_digest(tensors[name].reshape(-1)[:1024] for name in sorted(tensors))
    return value_digest([sorted((name, tensor.shape) for name, tensor in tensors.items()), first])


def check_base(workdir: pathlib.Path, folder: pathlib.Path, part: str = "transformer") -> None:
    """Keeps in a run's workdir with which weights of a part ("transformer" or "vae") it began.

    Raises:
      UserError: that was another than the folder's.
    """
    path, digest = workdir / "base.json", weights_digest(folder, part)
    if path.is_file():
        if json.loads(path.read_text()).get(part) != digest:
            raise UserError(
                f"{folder} holds another {part} than the one that the run in {workdir} began with: name that "
                "(config.pretrained), or choose another workdir."
            )
    elif jax.process_index() == 0:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({part: digest}) + "\n")
