"""Trains on top of Wan (text to video): a LoRA, or the whole model, on your videos with captions.

    sora-jax train --config finetune_wan --workdir runs/style \
        --config.data.source=path/to/videos
    sora-jax generate "WORDS OF YOUR CAPTIONS" --model runs/style
    sora-jax export runs/style --to style-lora

The folder is `pretrained`, as diffusers writes it: here Wan2.1's of 1.3 billion parameters on the hub, or
`--config.pretrained=path/to/Wan2.1-T2V-1.3B-Diffusers`. `--config finetune_wan:full` trains all parameters, and
`--config finetune_wan:debug` goes through all that a run does on a tiny folder of yours, and learns nothing.
`sora-jax export` writes what diffusers loads: a LoRA file, or a whole folder.

For Wan2.2-TI2V-5B set `--config.data.grid=4,32,32 --config.data.rates=24`; it takes given frames, so
`--config.pipeline.canvases.first=0.3` teaches to animate pictures too.

Expected: not run at this size (the project has no machine for it yet). The debug form on a folder of two layers takes
81 seconds of processor time, most of it compiling.
"""

from ml_collections import ConfigDict


def get_config(size: str = "lora") -> ConfigDict:
    config = ConfigDict(
        {
            "objective": "finetune",
            "seed": 0,
            "steps": 2_000,
            "pretrained": "hf:Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "text_tokens": 512,  # as in the model's own training
            "lora": {"rank": 32, "alpha": 32.0, "targets": "^blocks/"},
            "transformer": {"dtype": "bfloat16", "weights": "bfloat16", "remat": "none"},
            "flow": {
                "mean": 0.0,
                "deviation": 1.0,
                "shift": 0.0,  # the folder's scheduler's
                "text_dropout": 0.1,
            },
            "data": {
                "source": "videos",
                "resolutions": (480,),
                "aspects": ("16:9", "9:16", "1:1"),
                "durations": (0.0, 1.0, 2.0, 5.0),
                "rates": (16.0,),
                "max_frames": 81,
                "grid": (4, 16, 16),  # a token: 8x8 pixels a cell, 2x2 cells
            },
            "latents": {"clips": 2_000, "batch": 4},
            "pipeline": {
                "seq_len": 32_768,  # 21 latent frames of 480x832 are 32,760 tokens
                "text_len": 2_048,
                "batch_size": 1,
                "max_segments": 16,
                "num_packing_bins": 64,
            },
            "optim": {
                "name": "adamw",
                "lr": 1e-4,
                "warmup": 50,
                "schedule": "constant",
                "weight_decay": 0.0,
                "ema_decay": 0.99,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "log": {"every": 10, "heldout_every": 0, "sheet_every": 0},
            "checkpoint": {"every": 250, "keep": 2},
        }
    )
    if size == "full":
        config.update({"lora": {"rank": 0}, "transformer": {"weights": "float32"}, "optim": {"lr": 1e-5}})
    if size == "debug":
        config.update(DEBUG)
    return config


# Every part of a run, each as small as it goes.
DEBUG = {
    "steps": 10,
    "pretrained": "",
    "text_tokens": 64,
    "lora": {"rank": 4},
    "transformer": {
        "dtype": "float32",
        "weights": "float32",
        "remat": "all",
        "attention": "reference",  # compiles in half the time
    },
    "data": {
        "source": "toyworld",
        "resolutions": (32,),
        "aspects": ("1:1",),
        "durations": (0.0, 0.5),
        "rates": (16.0,),
    },
    "latents": {"clips": 16},
    "pipeline": {"seq_len": 64, "text_len": 256, "num_packing_bins": 4},
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 2, "sheet_every": 10},
}
