"""Models on the Hugging Face hub: `hf:OWNER/NAME[@REVISION]`, fetched into the hub's usual cache, or found there."""

from __future__ import annotations

import json
import os
import pathlib
import re

from sora_jax.errors import UserError

PREFIX = "hf:"
TIMEOUT = 20.0  # seconds until the hub must have answered a question about a file
# What a diffusers pipeline is made of. PyTorch's pickles and weights for other frameworks aren't fetched, nor weights
# beside the folders of its parts: some repositories hold every version there as one file each (Lightricks/LTX-Video).
_PATTERNS = ("*.json", "*/*.safetensors", "*/*.model", "*.txt", "*.md")
_SETTINGS = ("*.json",)
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def resolve(name: str | os.PathLike[str], weights: bool = True) -> str | os.PathLike[str]:
    """The folder of a model on the hub; any other name as it is.

    `weights`: whether they are wanted, or settings alone.

    What is in the cache whole is taken from there without asking the network. A download shows its progress, and goes
    on where it was interrupted.

    Raises:
      UserError: the name is none that the hub could have, or the model is neither there nor in the cache.
    """
    if not isinstance(name, str) or not name.startswith(PREFIX):
        return name
    wanted = name.removeprefix(PREFIX)
    if not _NAME.fullmatch(wanted):
        raise UserError(f"{name!r} names no model on the hub: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    repository, _, revision = wanted.partition("@")
    import huggingface_hub  # here: it is slow to import
    from huggingface_hub.errors import LocalEntryNotFoundError

    def folder(offline: bool) -> pathlib.Path:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(_PATTERNS if weights else _SETTINGS),
                local_files_only=offline,
                etag_timeout=TIMEOUT,
            )
        )

    try:
        if not missing_files(cached := folder(offline=True), weights):
            return cached
    except LocalEntryNotFoundError:
        pass
    except Exception as error:  # the hub's client raises errors of many libraries
        raise UserError(f"The hub's cache of {repository} can't be read ({error}): remove it.") from error
    try:
        fetched = folder(offline=False)
    except Exception as error:
        raise UserError(
            f"{repository} is not in the hub's cache and can't be fetched ({type(error).__name__}): check the name and "
            "the network, or fetch it elsewhere and give --model its folder."
        ) from error
    if missing := missing_files(fetched, weights):
        raise UserError(f"{repository} is on the hub without {missing[0]}: it can't be loaded.")
    return fetched


def missing_files(folder: pathlib.Path, weights: bool = True) -> list[str]:
    """Shards of weights that an index names and that aren't there: a cache may be returned as if it were whole."""
    missing = [] if (folder / "model_index.json").is_file() else ["model_index.json"]
    for index in () if not weights else folder.glob("*/*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            missing.append(f"{index.parent.name}/{index.name}")
            continue
        missing += [
            f"{index.parent.name}/{shard}" for shard in sorted(shards) if not (index.parent / shard).is_file()
        ]
    return missing
