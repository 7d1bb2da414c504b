"""Trains a DiT on the pixels of Moving MNIST: ten frames are given, ten are generated.

    python experiments/moving_mnist/run.py digits          # cache/mnist.npz
    sora-jax train --config moving_mnist --workdir runs/mnist

The argument is a size of `sora_jax.models.dit.SIZES`: `--config moving_mnist:S`; or debug: `--config
moving_mnist:debug` goes through all that a run does in seconds, on toyworld's clips, so without a file of digits.

There is no autoencoder: a token is 8×8 pixels of four frames, and the transformer predicts them clean. Clips are made
when they are read, so none comes twice. Expected: experiments/moving_mnist/README.md.
"""

from ml_collections import ConfigDict


def get_config(size: str = "Nano") -> ConfigDict:
    config = ConfigDict(
        {
            "objective": "dit",
            "seed": 0,
            "steps": 12_000,
            "autoencoder": "grey",
            "dit": {
                "size": size,
                "patch": (1, 8, 8),
                "channels": 4,  # four frames of one pixel
                "text_width": 32,
                "absolute": True,
                "predict": "clean",
                "dtype": "bfloat16",
                "remat": "dots",
            },
            "text": {"kind": "hash", "width": 32, "max_tokens": 3},  # clips have no words
            "flow": {"base_tokens": 64.0, "text_dropout": 0.0},
            "data": {
                "source": "cache/mnist.npz",
                "resolutions": (64,),
                "aspects": ("1:1",),
                "durations": (3.0,),  # 25 frames, of which 22 are whole groups: 10 given, 12 generated
                "rates": (8.0,),
            },
            "latents": {"clips": 10_000_000, "given": 10, "store": False},
            "pipeline": {
                "seq_len": 448,  # a clip: 7 latent frames of 64 tokens
                "text_len": 4,
                "batch_size": 8,
                "max_segments": 1,
                "num_packing_bins": 1,
            },
            "optim": {
                "name": "muon",
                "lr": 2e-3,
                "warmup": 100,
                "schedule": "linear",
                "final_lr_fraction": 0.02,
                "ema_decay": 0.999,
                "weight_decay": 0.01,
            },
            "log": {"every": 50, "heldout_every": 500, "heldout_batches": 8, "sheet_every": 0},
            "checkpoint": {"every": 250, "keep": 2},
        }
    )
    if size == "debug":
        config.update(DEBUG)
    return config


DEBUG = {
    "steps": 10,
    "dit": {"size": "", "width": 32, "layers": 2, "heads": 2, "dtype": "float32"},
    "text": {"max_tokens": 64},
    "data": {"source": "toyworld", "resolutions": (32,)},
    "latents": {"clips": 32},
    "pipeline": {"seq_len": 128, "text_len": 64, "max_segments": 2},
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 2, "sheet_every": 10},
}
