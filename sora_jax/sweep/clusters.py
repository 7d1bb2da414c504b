"""A sweep as commands for other machines: a list, a SLURM array, workloads of xpk.

None of these was run on a cluster by us: the commands in them are those that run here, the rest is what the tools'
own documentation says.
"""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Sequence

from sora_jax.errors import UserError
from sora_jax.sweep.points import Point, training_config

_WORKLOAD = 40  # letters of a name on Kubernetes, at most


def list_commands(points: Sequence[Point], command: Sequence[str]) -> str:
    """A line each: `command` with the point's key, which makes that one run and its row, and what it is called.

    Args:
      command: of the whole sweep: ["sora-jax", "sweep", FILE, "--out", FOLDER].
    """
    lines = [f"{shlex.join([*command, '--only', point.key])}  # {point.title}" for point in points]
    return "\n".join(lines)


def slurm_script(points: Sequence[Point], command: Sequence[str], name: str) -> str:
    """A script for sbatch: an array with a task a run, each on one GPU.

    A task that is told to end, two minutes before its time is up, finishes its step and saves; requeued or submitted
    again it goes on from there.
    """
    keys = " ".join(point.key for point in points)
    return f"""#!/bin/bash
# {len(points)} runs of a sweep, one a task. Submit it from the folder in which it was made: sbatch FILE
# All tasks share that folder; adapt GPUs, cores, time and partition.
#SBATCH --job-name={_plain(name)}
#SBATCH --array=0-{len(points) - 1}
#SBATCH --ntasks=1 --gpus-per-task=1 --cpus-per-task=8
#SBATCH --time=24:00:00 --requeue --open-mode=append
#SBATCH --signal=TERM@120

keys=({keys})
srun {shlex.join(command)} --only "${{keys[$SLURM_ARRAY_TASK_ID]}}"
# When all have ended: sora-jax sweep table {shlex.quote(command[2])}
"""


def xpk_commands(
    points: Sequence[Point], command: Sequence[str], name: str, out: pathlib.Path, latents: pathlib.Path
) -> str:
    """A command each that starts a workload of xpk, which trains on the hosts of a TPU slice.

    A workload trains and nothing else; the same sweep on one machine that has the folder then measures what is trained
    and writes the rows.

    Raises:
      UserError: `out` or `latents` is a relative path: workloads begin in a folder of their own.
    """
    for option, path in (("--out", out), ("--latents", latents)):
        if not path.is_absolute():
            raise UserError(
                f"{option} {path} must begin with /, in a folder that all hosts mount, such as /mnt/shared/sweeps."
            )
    lines = [
        "# Set CLUSTER, PROJECT, ZONE, TPU (v5litepod-16) and IMAGE first, and run these from any machine."
    ]
    for point in points:
        words = ["sora-jax", "train", "--hosts=auto", "--config", point.base]
        words += ["--workdir", str(out / point.folder)]
        words += [f"--config.{key}={text}" for key, text in point.overrides.items()]
        if folder := training_config(point, latents).get("latents", {}).get("folder"):
            words.append(f"--config.latents.folder={folder}")
        workload = f"{_plain(name)[: _WORKLOAD - 5].strip('-')}-{point.index}"
        lines.append(
            f"xpk workload create --workload {workload} --command {shlex.quote(shlex.join(words))} "
            '--cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" --tpu-type "$TPU" --num-slices 1 '
            f'--docker-image "$IMAGE"  # {point.title}'
        )
    lines.append(f"# When all have ended, on one machine that mounts {out}: {shlex.join(command)}")
    return "\n".join(lines)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "sweep"
