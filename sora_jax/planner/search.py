"""The smallest change that makes a step fit its chips, by trying changes from the cheapest to the most expensive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from sora_jax.distributed.chips import Topology
from sora_jax.errors import UserError
from sora_jax.planner.programs import Built, StepSpec, make_step_spec

REMAT = ("all", "dots", "none")
FAR = 1.3  # times a chip's memory: arithmetic is 2 to 24% below the compiler (experiments/scale)
Change = dict[str, Any]  # keys of a configuration, such as "dit.remat", and their values


def changes(spec: StepSpec) -> Iterator[tuple[Change, Topology]]:
    """Changes that need less memory a chip, mildest first.

    The first kinds compute the same step; then momentum is rounded, gradients are accumulated, and at last more chips
    are taken.
    """
    config, mesh, here = spec.config, spec.mesh, spec.topology
    is_dit, learns = config.objective != "vae", spec.step == "train"
    saving: Change = {}
    if is_dit and learns:
        dit = "transformer" if config.objective == "finetune" else "dit"
        for remat in REMAT[REMAT.index(config[dit].get("remat", "all")) + 1 :]:
            saving = {f"{dit}.remat": remat}
            yield saving, here
    if is_dit:
        for times in (2, 4, 8):
            for axis in ("sequence", "tensor"):
                # Taken from the batch's axes; so the other axes stay, and the number of chips doesn't change.
                giver = next((name for name in ("fsdp", "data") if mesh[name] % times == 0), None)
                if giver:
                    sizes = mesh | {axis: mesh[axis] * times, giver: mesh[giver] // times}
                    yield saving | {f"mesh.{name}": size for name, size in sizes.items()}, here
    if learns:
        part = "pipeline" if is_dit else "loss"
        accumulated, shards = config.optim.get("accumulate", 1), config[part].get("shards", 1)
        for times in (2, 4, 8):
            if spec.batch_size % times == 0:
                # All counts of an optimizer are in batches, see `OptimConfig`.
                parts = {"steps": config.steps * times, "optim.accumulate": accumulated * times}
                parts |= {"optim.warmup": config.optim.get("warmup", 100) * times}
                if doubles := config.optim.get("accumulate_doubles", ()):
                    parts["optim.accumulate_doubles"] = tuple(end * times for end in doubles)
                fewer = {
                    f"{part}.batch_size": spec.batch_size // times,
                    f"{part}.shards": math.gcd(shards, spec.batch_size // times),
                }
                yield saving | fewer | parts, here
        if config.optim.get("momentum_dtype", "float32") == "float32":
            yield saving | {"optim.momentum_dtype": "bfloat16"}, here
    for times in (2, 4, 8):
        larger = here.of(here.count * times)
        if larger.count > here.count:
            free = {"mesh.fsdp": -1, "mesh.data": 1}
            yield saving | free, larger


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
    spec: StepSpec,
    build: Callable[[StepSpec], Built],
    log: Callable[[str], None],
    most: int = 8,
    guess: Callable[[StepSpec], Built] | None = None,
) -> tuple[str, Built | None]:
    """Tries changes until one fits.

    Args:
      build: compiles a step, or estimates its memory.
      log: called with each change that is tried.
      most: tries; impossible ones (a batch or heads that don't divide) don't count.
      guess: estimates a step's memory where building takes long: changes that are far from fitting aren't tried.

    Returns:
      The change, as flags, and what was built with it; "" and None where no try fitted.
    """
    tried = 0
    for values, topology in changes(spec):
        flags = " ".join(f"--config.{key}={value}" for key, value in values.items())
        if topology != spec.topology:
            flags += f" --topology {topology.name}"
        try:
            other = make_step_spec(change(spec.config, values), spec.step, topology)
            if guess and topology.chip and sum(guess(other).memory.values()) > FAR * topology.chip.memory:
                continue
            log(flags)
            built = build(other)
        except UserError:
            continue
        if built.fits:
            return flags.strip(), built
        tried += 1
        if tried == most:
            break
    return "", None
