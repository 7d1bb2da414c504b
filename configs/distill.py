"""Distils a transformer into a flow map of 1 to 4 steps, its guidance included ("Turbo").

    sora-jax train --config distill --workdir runs/turbo
    sora-jax generate "a red circle moves left" --model runs/turbo

The argument is the teacher, after a colon: a bundled model, a folder that holds one, or a run's workdir; the student
has its architecture, autoencoder and text encoder. `--config distill:debug` goes through all that a run does and
learns nothing. Clips are those of configs/toyworld_dit.py, or
`--config.data.source`'s.

Expected (experiments/turbo/README.md): after 1,700 steps (26 minutes of processor time on two CPU cores) 62% of the
validation prompts right in colour, shape and direction at 4 steps, 56% at 2, where the teacher has 68% at 12.
"""

import dataclasses

from ml_collections import ConfigDict

from sora_jax.checkpoints.bundle import load_bundle
from sora_jax.train.config_files import load


def get_config(teacher: str = "toyworld") -> ConfigDict:
    debug = teacher == "debug"
    teacher = "toyworld" if debug else teacher
    config, bundle = ConfigDict(load("toyworld_dit")), load_bundle(teacher)
    dit = dataclasses.asdict(bundle.dit.config) | {"flow_map": True, "remat": "dots"}
    if dit["size"]:
        dit |= dict.fromkeys(("width", "layers", "heads"), 0)  # those of the size
    config.update(
        {
            "objective": "distill",
            "steps": 6_000,
            "autoencoder": teacher,
            "distill": {"teacher": teacher, "guidance": bundle.sampling.guidance},
            "text": dataclasses.asdict(bundle.text),
            "flow": {"base_tokens": bundle.base_tokens, "text_noise": 0.0},
            # Clips rather than pictures: what a shape is the teacher knows.
            "data": {"durations": (0.0, 1.0, 2.0, 2.0, 3.0)},
            # Half of a batch's sequences learn short steps, half long ones.
            "pipeline": {
                "seq_len": bundle.limits.tokens,
                "text_len": bundle.limits.text_len,
                "batch_size": 2,
            },
            "optim": {"lr": 3e-4},
        }
    )
    config.dit = ConfigDict(dit)
    if debug:
        small = load("toyworld_dit:debug")
        config.update(
            {name: small[name] for name in ("steps", "data", "latents", "pipeline", "optim", "log")}
        )
    return config
