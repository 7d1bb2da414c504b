"""Trains on top of LTX-Video: a LoRA, or the whole model, on your videos with captions.

    sora-jax train --config finetune_ltx --workdir runs/style \
        --config.data.source=path/to/videos
    sora-jax generate "WORDS OF YOUR CAPTIONS" --model runs/style
    sora-jax export runs/style --to style-lora

As configs/finetune_wan.py, from which this differs in what the model is: its name on the hub, its captions' length, its
cells, and the clips of its training. `:full` trains all parameters, `:debug` goes through all that a run does on a tiny
folder of yours. The model takes given frames, so `--config.pipeline.canvases.first=0.3` keeps it used to them.

Expected: not run at this size (the project has no machine for it yet).
"""

from ml_collections import ConfigDict

from sora_jax.train.config_files import load


def get_config(size: str = "lora") -> ConfigDict:
    config = ConfigDict(load(f"finetune_wan:{size}"))
    config.update(
        {
            "text_tokens": 128,  # to which captions are filled up, and what fills them is attended to
            "data": {"grid": (8, 32, 32)},  # a token: one cell
        }
    )
    if size == "debug":
        config.update({"data": {"durations": (0.0, 1.0)}, "pipeline": {"text_len": 512}})
    else:
        config.update(
            {
                "pretrained": "hf:Lightricks/LTX-Video",
                "data": {
                    "resolutions": (512,),
                    "durations": (0.0, 1.0, 2.0, 4.0),
                    "rates": (25.0,),
                    "max_frames": 97,
                },
                "pipeline": {"seq_len": 16_384},  # 13 latent frames of 512x896 are 5,824 tokens
            }
        )
    return config
