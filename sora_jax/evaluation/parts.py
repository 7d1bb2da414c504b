"""What was measured of each clip, in files: an interrupted evaluation goes on, and shards of one are put together.

A part is an `.npz` of a few clips. Rows are named by what they were made of (contents, not paths or shards), so parts
of any machines may lie in one folder.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sora_jax.errors import UserError, atomic_path
from sora_jax.evaluation.measure import Row
from sora_jax.media.digests import value_digest

_SETTINGS = "settings.json"


class Parts:
    """A folder of parts, all made with the same settings."""

    def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
        """Opens the folder or makes it.

        Raises:
          UserError: it holds parts of other settings, or can't be written.
        """
        self.folder = folder
        settings, path = json.loads(json.dumps(settings)), folder / _SETTINGS
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} is no folder of parts: name an empty or a new one.") from None
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read ({error}): remove {folder}, and measure again.") from error
        differing = sorted(
            key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key)
        )
        if differing:
            changes = "; ".join(f"{key} was {before.get(key)}, now {settings.get(key)}" for key in differing)
            raise UserError(
                f"{folder} holds parts of an evaluation with other settings ({changes}): name another folder with "
                "--parts, or remove it."
            )

    def read(self, wanted: Iterable[str]) -> dict[str, Row]:
        """The rows that are there of those wanted, by their keys; a damaged part is removed and measured again."""
        keys = set(wanted)
        found: dict[str, Row] = {}
        for path in sorted(self.folder.glob("*.npz")):
            try:
                rows = _read(path)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                path.unlink(missing_ok=True)
                continue
            found |= {key: row for key, row in rows.items() if key in keys}
        return found

    def write(self, rows: Mapping[str, Row]) -> None:
        """Adds a part; it is there whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        for metric in sorted({name for row in rows.values() for name in row.features}):
            arrays[f"features/{metric}"] = np.stack([row.features[metric] for row in rows.values()])
        listed = [{"key": key, "figures": dict(row.figures)} for key, row in rows.items()]
        arrays["rows"] = np.frombuffer(json.dumps(listed).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)
        with atomic_path(self.folder / f"{value_digest(sorted(rows))}.npz") as temporary:
            temporary.write_bytes(file.getvalue())


def remove_parts(folder: pathlib.Path) -> None:
    """Removes the parts in a folder, and the folder where nothing else is in it."""
    for path in [*folder.glob("*.npz"), folder / _SETTINGS]:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _read(path: pathlib.Path) -> dict[str, Row]:
    with np.load(path, allow_pickle=False) as file:
        listed = json.loads(file["rows"].tobytes())
        features = {name.removeprefix("features/"): file[name] for name in file.files if name != "rows"}
    return {
        row["key"]: Row(row["figures"], {metric: rows[i] for metric, rows in features.items()})
        for i, row in enumerate(listed)
    }
