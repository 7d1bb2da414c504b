"""Trains the bundled model's autoencoder on toyworld and, where `config.data.source` names files, on footage.

    sora-jax train --config toyworld_vae --workdir runs/vae \
      --config.data.source=toyworld:0.85,../shared/footage:0.15

The argument is empty, or debug: `--config toyworld_vae:debug` goes through all that a run does, to a sheet of
reconstructions, in half a minute on two cores, and learns nothing.

Expected (experiments/bundled_model/README.md): the bundled autoencoder, after three trainings, reconstructs clips that
it never saw at 32.0 dB PSNR (toyworld, 17x64x64 at 8 fps; single frames 35.9; footage at 128 pixels 28.6). A step of 2
clips took 0.31 s on one CPU core (experiments/LOG.md, 2026-11-22), so 12,000 take about an hour. From random weights
this configuration hasn't been run as a whole.
"""

from ml_collections import ConfigDict

from sora_jax.errors import UserError


def get_config(size: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "objective": "vae",
            "seed": 0,
            "steps": 12_000,
            "init_from": "",
            # Compresses 4x8x8, to 16 channels. One list entry a stage, from pixels to latents in both.
            "vae": {
                "encoder_widths": (24, 64, 160),
                "encoder_blocks": (0, 1, 2),
                "decoder_widths": (32, 96, 160),
                "decoder_blocks": (1, 2, 3),
                "dtype": "bfloat16",  # of arithmetic; parameters are float32
            },
            # Few clips a step: at equal time better than eight, where it was tried (experiments/LOG.md).
            "loss": {"batch_size": 2, "shards": 1, "crop": (9, 64, 64)},
            "data": {
                "source": "toyworld",
                "cache": "",
                # Of these lists a clip draws one value each: what is repeated comes more often.
                "resolutions": (64, 64, 64, 64, 64, 64, 96, 128),
                "aspects": ("1:1", "16:9", "9:16"),
                "durations": (1.0,),
                "rates": (8.0, 8.0, 8.0, 12.0, 24.0),
                "world": {
                    "objects": (0.2, 0.3, 0.5)
                },  # mostly three things, as they are harder to reconstruct
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
            "log": {"every": 50, "heldout_every": 500, "sheet_every": 2000},
            "checkpoint": {"every": 500, "keep": 2},
        }
    )
    if size == "debug":
        config.update(DEBUG)
    elif size:
        raise UserError(f"toyworld_vae takes no argument {size!r}: leave it out, or use debug.")
    return config


# Every part of a run, each as small as it goes.
DEBUG = {
    "steps": 10,
    "vae": {
        "channels": 4,
        "encoder_widths": (8, 8, 8),
        "encoder_blocks": (0, 0, 1),
        "decoder_widths": (8, 8, 8),
        "decoder_blocks": (0, 0, 1),
        "dtype": "float32",
    },
    "loss": {"crop": (5, 32, 32)},
    "data": {"resolutions": (32,), "rates": (8.0,)},
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 2, "sheet_every": 10},
}
