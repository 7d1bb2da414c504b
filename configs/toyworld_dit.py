"""Trains a packed DiT on toyworld: one compiled step for every mix of durations, resolutions and aspect ratios.

    sora-jax train --config toyworld_dit --workdir runs/dit

The argument is a size of `sora_jax.models.dit.SIZES`: `--config toyworld_dit:S`. Other footage is one
field away: `--config.data.source=path/to/videos`. Expected: see experiments/bundled_model/README.md.
"""

from ml_collections import ConfigDict


def get_config(size: str = "Nano") -> ConfigDict:
    return ConfigDict(
        {
            "objective": "dit",
            "seed": 0,
            "steps": 20_000,
            "autoencoder": "toyworld",
            "init_from": "",
            "dit": {
                "size": size,
                "width": 0,
                "layers": 0,
                "heads": 0,
                "patch": (1, 1, 1),
                "absolute": True,
                "pooled_text": True,
                "reference_frames": True,
                "dtype": "bfloat16",
                "remat": "dots",
                "sequence": "heads",
            },
            "text": {"max_tokens": 64},
            "flow": {
                "mean": 0.0,
                "deviation": 1.0,
                "base_tokens": 32.0,
                "text_dropout": 0.1,
                "text_noise": 0.3,
            },
            "data": {
                "source": "toyworld",
                "resolutions": (64, 64, 64, 64, 64, 64, 64, 128),
                "aspects": ("1:1", "1:1", "16:9", "9:16", "4:3"),
                "durations": (0.0, 1.0, 2.0, 2.0, 3.0),
                "rates": (8.0, 8.0, 8.0, 8.0, 24.0),
                "max_frames": 25,
                "cache": "",
                "world": {
                    "objects": (0.85, 0.1, 0.05),
                    "motions": (0.05, 0.6, 0.15, 0.06, 0.05, 0.04, 0.05),
                    "backgrounds": (0.6, 0.2, 0.2),
                    "cameras": (0.92, 0.04, 0.04),
                    "two_shots": 0.16,
                    "dissolves": 0.5,
                    "occluder": 0.04,
                },
            },
            "latents": {
                "folder": "",
                "clips": 24_000,
                "batch": 16,
                "layouts": {
                    "none": 0.55,
                    "last": 0.12,
                    "ends": 0.1,
                    "even": 0.13,
                    "scattered": 0.05,
                    "middle": 0.05,
                },
            },
            "pipeline": {
                "seq_len": 640,
                "text_len": 96,
                "batch_size": 2,
                "shards": 1,
                "max_segments": 16,
                "num_packing_bins": 512,
                "canvases": {
                    "none": 0.6,
                    "first": 0.12,
                    "begin": 0.1,
                    "box": 0.08,
                    "margins": 0.05,
                    "levels": 0.05,
                },
                "temporal_crop_prob": 0.15,
                "frame_tokens": 144,
                "caption_weights": {"short": 0.7, "detailed": 0.25, "timed": 1.5},
            },
            "optim": {
                "name": "muon",
                "lr": 6e-4,
                "warmup": 100,
                "schedule": "linear",
                "final_lr_fraction": 0.02,
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
