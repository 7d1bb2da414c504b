"""The training command on a tiny objective, for tests of several hosts: host_run.py WORKDIR STEPS MESH [FLAGS].

MESH is JSON; FLAGS are those of the command about hosts, or --shards=, --every=, --kill=STEP, --stop=STEP,
--sheet=STEP, --heldout=STEP and --real (the transformer of tiny_run instead of a line).
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

from ml_collections import ConfigDict

from helpers import fake_objective, tiny_run
from sora_jax.train import __main__ as command
from sora_jax.train.loop import TrainState, train

OURS = {"shards", "every", "kill", "stop", "sheet", "heldout", "real"}


def main(workdir: str, steps: str, mesh: str, *flags: str) -> int:
    """Runs the command with the configuration that the arguments describe."""
    own = {name: value for name, _, value in (flag[2:].partition("=") for flag in flags)}
    folder, given = pathlib.Path(workdir), fake_objective.get_config(int(steps))
    given.update(mesh=json.loads(mesh), shards=int(own.get("shards", 4)))
    run, parse = command.run, command.parse

    def run_this(config: ConfigDict, workdir: pathlib.Path) -> TrainState:
        config = make_config(workdir, config, own)
        if "real" in own:
            return run(config, workdir)
        return train(config, workdir, Line(int(own.get("kill", 0)), int(own.get("stop", 0))))

    command.run = run_this
    rest = [flag for flag in flags if flag[2:].partition("=")[0] not in OURS]
    command.parse = lambda argv: (given, folder, parse([f"--config={__file__}", "--workdir=x", *argv])[2])
    # Without any flag it would print its help.
    return command.main(["--host_timeout=60", *rest])


def make_config(workdir: pathlib.Path, given: ConfigDict, own: dict[str, str]) -> ConfigDict:
    """The run's configuration: after the hosts have joined, since some parts of it are made with JAX."""
    if "real" in own:
        # Its autoencoder is there already: two hosts would make it at once.
        config = tiny_run.tiny_config(workdir.parent, given.steps)
        config.pipeline.update(batch_size=4, shards=given.shards)
    else:
        config = fake_objective.get_config(given.steps)
        config.data.shards = given.shards
    config.mesh = given.mesh
    config.checkpoint.every = int(own.get("every", 3))
    config.log.sheet_every = int(own.get("sheet", 0))
    config.log.heldout_every = int(own.get("heldout", 0))
    return config


class Line(fake_objective.LineObjective):
    """Dies, or asks for the run's end, when it looks at a step."""

    def __init__(self, kill: int, stop: int):
        super().__init__()
        self.heldout_shards = 4
        self.signals = {kill: signal.SIGKILL, stop: signal.SIGTERM}

    def tokens(self, batch: dict) -> tuple[int, int]:
        step = int(batch["index"][0]) // fake_objective.ROWS + 1
        if step in self.signals:
            os.kill(os.getpid(), self.signals[step])
        return len(batch["index"]) * 3, len(batch["index"]) * 4


def get_config() -> ConfigDict:
    return fake_objective.get_config()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
