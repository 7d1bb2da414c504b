"""Trains a packed DiT on toyworld: one compiled step for every mix of durations, resolutions and aspect ratios.

    sora-jax train --config toyworld_dit --workdir runs/dit

The argument is a size of `sora_jax.models.dit_config.SIZES`: `--config toyworld_dit:S`; or debug: `--config
toyworld_dit:debug` goes through all that a run does, from encoding clips to a sheet of samples, in half a minute on two
cores, and learns nothing; or quick: `--config toyworld_dit:quick` is the smallest that learns something in minutes, the
base of configs/ablations: a Pico of coarse patches, clips of one thing that moves straight on over a plain background,
short captions. Other footage is one field away: `--config.data.source=path/to/videos`.

Expected (experiments/bundled_model/README.md): from the bundled model of before and 1,500 steps of pictures, 6,000
steps with these settings took 3,900 seconds of processor time on two CPU cores without an accelerator (6,000 tokens a
second): held-out loss 0.337 to 0.297, then 82.8% of the validation prompts right in colour, shape and direction at once
(256 clips, guidance 3, 12 Euler steps). From random weights this configuration hasn't been run as a whole.
"""

from ml_collections import ConfigDict


def get_config(size: str = "Nano") -> ConfigDict:
    small = {"debug": DEBUG, "quick": QUICK}.get(size, {})
    config = ConfigDict(
        {
            "objective": "dit",
            "seed": 0,
            "steps": 20_000,
            "autoencoder": "toyworld",  # the bundled one; runs/vae: one of your own
            "init_from": "",
            "dit": {
                "size": size,
                "width": 0,  # width, layers and heads are those of the size
                "layers": 0,
                "heads": 0,
                "patch": (1, 1, 1),  # single latent cells: 8x8 pixels, four frames
                "absolute": True,
                "pooled_text": True,
                "reference_frames": True,
                "dtype": "bfloat16",  # of arithmetic; parameters are float32
                "remat": "dots",
                "sequence": "heads",
            },
            "text": {"max_tokens": 64},
            "flow": {
                "mean": 0.0,
                "deviation": 1.0,
                # Half of a square frame's 64 tokens: what moves where is decided above sigma = 0.8, so most of training
                # is near noise.
                "base_tokens": 32.0,
                "text_dropout": 0.1,
                "text_noise": 0.3,
            },
            "data": {
                "source": "toyworld",
                # Of these lists a clip draws one value each: what is repeated comes more often.
                "resolutions": (64, 64, 64, 64, 64, 64, 64, 128),
                "aspects": ("1:1", "1:1", "16:9", "9:16", "4:3"),
                # Mostly pictures, a third of the tokens: what a shape is they teach at a fifth of a clip's cost.
                "durations": (*[0.0] * 12, 1.0, 2.0, 2.0, 3.0),
                "rates": (8.0, 8.0, 8.0, 8.0, 24.0),
                "max_frames": 25,
                "cache": "",
                # Probabilities, in the order of `toyworld.scene.WorldConfig`: mostly one thing that moves straight on.
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
                "clips": 24_000,  # encoded once: 60 a second on two cores
                "batch": 16,
                # Which whole frames are given: decided before encoding, as each given stretch is encoded by itself.
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
                "seq_len": 640,  # the longest clip: 7 latent frames of 8x8 tokens or more
                "text_len": 192,
                "batch_size": 4,
                "shards": 1,
                "max_segments": 16,
                "num_packing_bins": 512,
                # What else is given, drawn again each time a clip is read. "context" and "anchor" are as later windows
                # of long clips, whose context is partially noised.
                "canvases": {
                    "none": 0.5,
                    "first": 0.1,
                    "begin": 0.08,
                    "box": 0.08,
                    "margins": 0.05,
                    "levels": 0.05,
                    "context": 0.1,
                    "anchor": 0.04,
                },
                "temporal_crop_prob": 0.15,
                "frame_tokens": 144,  # larger frames (128 px) are cropped to 12x12 tokens
                "caption_weights": {"short": 0.7, "detailed": 0.25, "timed": 1.5},
            },
            "optim": {
                "name": "muon",
                "lr": 2e-3,
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
            "log": {"every": 50, "heldout_every": 500, "sheet_every": 2000},
            "checkpoint": {"every": 500, "keep": 2},
        }
    )
    config.update(small)
    if size == "quick":  # nothing is given: every canvas is text to video
        config.latents.layouts = config.pipeline.canvases = ConfigDict({"none": 1.0})
        config.pipeline.caption_weights = ConfigDict({"short": 1.0})
    return config


# Every part of a run, each as small as it goes; the text encoder is the one that needs no files.
DEBUG = {
    "steps": 10,
    "dit": {"size": "", "width": 32, "layers": 2, "heads": 2, "text_width": 32, "dtype": "float32"},
    "text": {"kind": "hash", "width": 32},
    "data": {"resolutions": (32,), "aspects": ("1:1",), "durations": (0.0, 1.0), "rates": (8.0,)},
    "latents": {"clips": 32, "layouts": {"none": 1.0}},
    "pipeline": {"seq_len": 128, "num_packing_bins": 4},
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 2, "sheet_every": 10},
}

QUICK = {
    "steps": 600,
    "dit": {"size": "Pico", "patch": (1, 2, 2)},  # a square frame of 64 pixels is 16 tokens
    "flow": {"base_tokens": 8.0},
    "data": {
        "resolutions": (64,),
        "aspects": ("1:1",),
        "durations": (0.0, 1.0),
        "rates": (8.0,),
        "world": {
            "objects": (1.0, 0.0, 0.0),
            "motions": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
            "backgrounds": (1.0, 0.0, 0.0),
            "cameras": (1.0, 0.0, 0.0),
            "two_shots": 0.0,
            "occluder": 0.0,
            "leave": 0.0,
        },
    },
    "latents": {"clips": 4_000},
    "pipeline": {
        "seq_len": 512,
        "text_len": 256,
        "batch_size": 2,
        "max_segments": 24,
        "num_packing_bins": 32,
        "temporal_crop_prob": 0.0,
        "frame_tokens": 0,
    },
    "optim": {"warmup": 50},
    "log": {"heldout_every": 0, "sheet_every": 0},
    "checkpoint": {"every": 200, "keep": 1},
}
