"""Trains on top of an open model's autoencoder (Wan's, LTX-Video's): its decoder on your videos.

    sora-jax train --config finetune_vae --workdir runs/decoder \
        --config.pretrained=path/to/Wan2.1-T2V-1.3B-Diffusers --config.data.source=path/to/videos
    sora-jax generate "A PROMPT" --model runs/decoder
    sora-jax export runs/decoder --to Wan2.1-T2V-1.3B-mine

The encoder stays as it is, so that latents stay those that the model's transformer knows. `--config.optim.trainable=`
trains both halves, and then the transformer has to follow. `--config finetune_vae:debug` goes through all that a run
does on a tiny folder of yours, and learns nothing.

Expected: not run on real weights (none could be downloaded where this was built). Wan 2.1's autoencoder at true width:
docs/finetuning.md has the time and the memory of a step.
"""

from ml_collections import ConfigDict

from sora_jax.errors import UserError


def get_config(size: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "objective": "finetune_vae",
            "seed": 0,
            "steps": 2_000,
            "pretrained": "hf:Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "autoencoder": {"dtype": "bfloat16", "remat": True},
            "loss": {
                "batch_size": 1,
                "shards": 1,
                "crop": (17, 256, 256),
                "kl": 0.0,
            },  # kl: of an encoder that learns
            "data": {
                "source": "videos",
                "resolutions": (256, 480),
                "aspects": ("16:9", "9:16", "1:1"),
                "durations": (1.5,),
                "rates": (16.0,),
            },
            "optim": {
                "name": "adamw",
                "lr": 1e-5,
                "warmup": 50,
                "schedule": "constant",
                "weight_decay": 0.0,
                "ema_decay": 0.999,
                "trainable": "^(decoder|post_quant_conv)/",
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "log": {"every": 10, "heldout_every": 0, "sheet_every": 250},
            "checkpoint": {"every": 250, "keep": 2},
        }
    )
    if size == "debug":
        config.update(DEBUG)
    elif size:
        raise UserError(f"finetune_vae takes no argument {size!r}: leave it out, or use debug.")
    return config


# Every part of a run, each as small as it goes.
DEBUG = {
    "steps": 10,
    "pretrained": "",
    "autoencoder": {"dtype": "float32", "remat": False},
    "loss": {"crop": (5, 32, 32)},
    "data": {
        "source": "toyworld",
        "resolutions": (32,),
        "aspects": ("1:1",),
        "durations": (1.0,),
        "rates": (8.0,),
    },
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 1, "sheet_every": 10},
}
