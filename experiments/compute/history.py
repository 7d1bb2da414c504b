"""The bundled model as it was trained five times: where git has its weights, and what each training took."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import subprocess
import tarfile
import tempfile

from sora_jax.errors import UserError
from sora_jax.pipeline.pipeline import Pipeline, load

FOLDER = "sora_jax/bundled/toyworld"
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model of git's history.

    Attributes:
      name: as experiments/bundled_model/README.md counts.
      commit: whose `FOLDER` holds its weights in a form that today's code loads.
      weights: numbers of the transformer, as it was trained.
      slots: of the transformer's training sequences, all trainings that led to it together: sequences × length ×
        steps, from the models' cards and experiments/LOG.md; 93 to 98% of them held tokens.
      core_minutes: of the transformer's trainings together, as the log has them, with other work beside.
    """

    name: str
    commit: str
    weights: int
    slots: int
    core_minutes: int

    @property
    def operations(self) -> float:
        """Of training, by the rule of 6 × weights × tokens (Kaplan et al. 2020); attention's products left out."""
        return 6.0 * self.weights * self.slots


# The second model's file of 2c7b78b is one of three coordinates. 2a314c5 has the same numbers, and zeros for the two
# coordinates that came with it.
_SECOND = (4350 + 15000) * 4 * 256
_THIRD = _SECOND + (6000 + 7000 + 11000) * 4 * 256
_FOURTH = _THIRD + (3650 + 20000) * 2 * 640
MODELS = (
    Trained("first", "7a1e72b", 8_257_984, 4300 * 8 * 256, 2 * 52),
    Trained("second", "2a314c5", 4_351_168, _SECOND, 24 + 2 * 45),
    Trained("third", "26ba53e", 4_388_608, _THIRD, 24 + 2 * 45 + 2 * 120),
    Trained("fourth", "b6046bf", 4_351_696, _FOURTH, 24 + 2 * 45 + 2 * 120 + 2 * 105),
    Trained(
        "fifth",
        "79843a8",
        4_351_696,
        _FOURTH + 1500 * 2 * 640 + 6000 * 4 * 640,
        24 + 2 * (45 + 120 + 105) + 73,
    ),
)


def restore(model: Trained) -> Pipeline:
    """The model as it was bundled, its weights read out of git.

    Raises:
      UserError: this is no clone that has the commit, or today's code can't load what it holds.
    """
    command = ["git", "-C", str(ROOT), "archive", model.commit, FOLDER]
    found = subprocess.run(command, capture_output=True)
    if found.returncode:
        raise UserError(
            f"git has no {FOLDER} at {model.commit} ({found.stderr.decode().strip()}): fetch the whole history, "
            "git fetch --unshallow."
        )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
            archive.extractall(folder, filter="data")
        try:
            return load(pathlib.Path(folder) / FOLDER)
        except UserError as error:
            raise UserError(
                f"Today's code can't load the {model.name} model of {model.commit}: {error} Check out that commit "
                "and draw its clips there, or give `Trained.commit` a later one whose weights are the same."
            ) from error
