"""Trains the bundled model's autoencoder on toyworld and, where `config.data.source` names files, on footage.

    sora-jax train --config toyworld_vae --workdir runs/vae \
      --config.data.source=toyworld:0.85,../shared/footage:0.15

Expected on two CPU cores: see experiments/bundled_model/README.md.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "objective": "vae",
            "seed": 0,
            "steps": 12_000,
            "init_from": "",
            "vae": {
                "encoder_widths": (24, 64, 160),
                "encoder_blocks": (0, 1, 2),
                "decoder_widths": (32, 96, 160),
                "decoder_blocks": (1, 2, 3),
                "dtype": "bfloat16",
            },
            "loss": {"batch_size": 2, "shards": 1, "crop": (9, 64, 64)},
            "data": {
                "source": "toyworld",
                "cache": "",
                "resolutions": (64, 64, 64, 64, 64, 64, 96, 128),
                "aspects": ("1:1", "16:9", "9:16"),
                "durations": (1.0,),
                "rates": (8.0, 8.0, 8.0, 12.0, 24.0),
                "world": {"objects": (0.2, 0.3, 0.5)},
            },
            "optim": {
                "name": "muon",
                "lr": 2e-3,
                "warmup": 50,
                "schedule": "linear",
                "final_lr_fraction": 0.0,
                "ema_decay": 0.999,
                "weight_decay": 0.01,
                "momentum_dtype": "float32",
                "accumulate": 1,
                "offload": False,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "log": {"every": 50, "sheet_every": 2000},
            "checkpoint": {"every": 500, "keep": 2},
        }
    )
