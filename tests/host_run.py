"""The training command on a tiny objective, for tests of several hosts: host_run.py WORKDIR STEPS MESH [FLAGS].

MESH is JSON; FLAGS are those of `python -m sora_jax.train` about hosts, or --shards=, --kill=STEP, --stop=STEP,
--sheet=STEP and --real (the transformer of tiny_run instead of a line).
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys

import fake_objective
import tiny_run
from ml_collections import ConfigDict

import sora_jax.train.loop
from sora_jax.train import __main__ as command


def main(workdir: str, steps: str, mesh: str, *flags: str) -> int:
    """Runs the command with the configuration that the arguments describe."""
    own = {name: value for name, _, value in (flag[2:].partition("=") for flag in flags)}
    folder = pathlib.Path(workdir)
    config = make_config(folder, int(steps), own)
    config.mesh = json.loads(mesh)
    objective = None if "real" in own else Line(int(own.get("kill", 0)), int(own.get("stop", 0)))
    train, parse = sora_jax.train.loop.train, command.parse
    sora_jax.train.loop.train = lambda config, workdir: train(config, workdir, objective)
    ours = {"shards", "kill", "stop", "sheet", "real"}
    rest = [flag for flag in flags if flag[2:].partition("=")[0] not in ours]
    command.parse = lambda argv: (config, folder, parse([f"--config={__file__}", "--workdir=x", *argv])[2])
    return command.main(rest)


def make_config(folder: pathlib.Path, steps: int, own: dict[str, str]) -> ConfigDict:
    shards = int(own.get("shards", 4))
    if "real" in own:
        config = tiny_run.tiny_config(folder.parent, steps)
        config.pipeline.update(rows=4, shards=shards)
    else:
        config = fake_objective.get_config(steps)
        config.data.shards = shards
    config.log.sheet_every = int(own.get("sheet", 0))
    return config


class Line(fake_objective.LineObjective):
    """Dies, or asks for the run's end, when it looks at a step."""

    def __init__(self, kill: int, stop: int):
        super().__init__()
        self.signals = {kill: signal.SIGKILL, stop: signal.SIGTERM}
        self.step = None

    def tokens(self, batch: dict) -> tuple[int, int]:
        # The shards' numbers run side by side, so a row tells the step only together with its shard.
        step = int(batch["index"][0]) // fake_objective.ROWS + 1
        if step in self.signals:
            os.kill(os.getpid(), self.signals[step])
        return len(batch["index"]) * 3, len(batch["index"]) * 4


def get_config() -> ConfigDict:
    return fake_objective.get_config()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
