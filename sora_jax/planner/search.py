"""The smallest change that makes a job fit its chips, found by trying, from what costs nothing to what costs most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from sora_jax.distributed.chips import Topology
from sora_jax.errors import UserError
from sora_jax.planner.programs import Built, Job, make_job

REMAT = ("all", "dots", "none")
FAR = 1.3  # times what a chip has: arithmetic is 2 to 24% below the compiler (experiments/scale)
Change = dict[str, Any]  # keys of a configuration, such as "dit.remat", and their values


def changes(job: Job) -> Iterator[tuple[Change, Topology]]:
    """What needs less memory a chip, mildest first.

    A step computes the same with the first kinds; then momentum is rounded, the batch comes in parts, and at last
    more chips are taken.
    """
    config, mesh, here = job.config, job.mesh, job.topology
    is_dit, learns = config.objective == "dit", job.step == "train"
    thrifty: Change = {}
    if is_dit and learns:
        for remat in REMAT[REMAT.index(config.dit.get("remat", "all")) + 1 :]:
            thrifty = {"dit.remat": remat}
            yield thrifty, here
    if is_dit:
        for times in (2, 4, 8):
            for axis in ("sequence", "tensor"):
                # From what rows lie over; so the other axes stay, and chips don't change.
                giver = next((name for name in ("fsdp", "data") if mesh[name] % times == 0), None)
                if giver:
                    sizes = mesh | {axis: mesh[axis] * times, giver: mesh[giver] // times}
                    yield thrifty | {f"mesh.{name}": size for name, size in sizes.items()}, here
    if learns:
        part = "pipeline" if is_dit else "loss"
        accumulated, shards = config.optim.get("accumulate", 1), config[part].get("shards", 1)
        for times in (2, 4, 8):
            if job.rows % times == 0:
                # All counts of an optimizer are in batches, see `OptimConfig`.
                parts = {"steps": config.steps * times, "optim.accumulate": accumulated * times}
                parts |= {"optim.warmup": config.optim.get("warmup", 100) * times}
                fewer = {
                    f"{part}.batch_size": job.rows // times,
                    f"{part}.shards": math.gcd(shards, job.rows // times),
                }
                yield thrifty | fewer | parts, here
        if config.optim.get("momentum_dtype", "float32") == "float32":
            yield thrifty | {"optim.momentum_dtype": "bfloat16"}, here
    for times in (2, 4, 8):
        larger = here.of(here.count * times)
        if larger.count > here.count:
            free = {"mesh.fsdp": -1, "mesh.data": 1}
            yield thrifty | free, larger


def change(config: ConfigDict, values: Change) -> ConfigDict:
    """A copy of a configuration with some values set."""
    changed = ConfigDict(config.to_dict())
    with changed.unlocked():
        for key, value in values.items():
            *parts, name = key.split(".")
            place = changed
            for part in parts:
                if part not in place:
                    place[part] = ConfigDict()
                place = place[part]
            place[name] = value
    return changed


def find_fit(
    job: Job,
    build: Callable[[Job], Built],
    tell: Callable[[str], None],
    most: int = 8,
    guess: Callable[[Job], Built] | None = None,
) -> tuple[str, Built | None]:
    """Tries changes until one fits.

    Args:
      build: compiles a job, or reckons it.
      tell: is told what is tried.
      most: tries; what can't be (rows that don't divide, heads) doesn't count.
      guess: reckons a job where building takes long: what is far from fitting by it isn't tried.

    Returns:
      What to change, in words, and what was built so; "" and None where no try fitted.
    """
    tried = 0
    for values, topology in changes(job):
        words = " ".join(f"--config.{key}={value}" for key, value in values.items())
        if topology != job.topology:
            words += f" --topology {topology.name}"
        try:
            other = make_job(change(job.config, values), job.step, topology)
            if guess and topology.chip and sum(guess(other).memory.values()) > FAR * topology.chip.memory:
                continue
            tell(words)
            built = build(other)
        except UserError:
            continue
        if built.fits:
            return words.strip(), built
        tried += 1
        if tried == most:
            break
    return "", None
