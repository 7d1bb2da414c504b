"""A ladder of models, from one that a laptop can train to one minute at 1080p on a slice of a pod.

    sora-jax plan --config ladder:XL --topology v6e:8x8
    sora-jax train --config ladder:XL --workdir runs/xl

The argument is a rung: Ti, S, B, XL, 3B, 7B, 14B or 14B-24fps; or an autoencoder, vae-4x8x8 or vae-4x16x16, which is
trained first: its workdir is the transformer's `config.autoencoder` (Ti and S use the bundled one). Footage is
`config.data.source`: a folder of videos. `--config ladder:debug` is Ti cut down to a run of all parts that ends in half
a minute on two cores.

Expected, by the TPU's compiler and a roofline (`sora-jax plan`, experiments/scale/README.md; not run): Ti on one v5e
chip 40 ms a step, 33 minutes in all; XL on 64 v6e chips 1.2 s a step, 4 days; 14B on 512 v5p chips 89 s a step, 2 days
for its last stage. None of them has been trained, so no loss is expected.

Why these numbers:

- **Sequence length** is the longest clip, so that it is one segment and attention sees all of it; shorter ones are
  packed together.
- **The autoencoder** compresses 4x8x8 as long as the tokens allow, with 4x16x16 (48 channels) from 480p on: at 1080p
  the first would make four times the tokens, and attention costs their square. Patches of 2x2 from 128 px on.
- **Frames a second** rise with the size up to 24. 14B has 12: a minute is then 369,240 tokens, half the frames to be
  filled in by interpolation; 14B-24fps generates them all.
- **The packer's bins** hold half a million tokens a shard, for they are in the host's memory.
- **Steps**, from 3B on, are those of a last stage: a model of that size learns on short and small clips first, where a
  clip costs a thousandth, and goes on from there (`config.init_from`).
- **Batches** have 0.1 to 6 million tokens, growing with the model, as the noise of its gradient falls more slowly.
- **The mesh**: `sequence` and `tensor` are as small as a packed sequence's activations allow, for they move
  activations, and their product divides the heads. Parameters are split over them and `fsdp`, so far that a chip's
  share of a matrix is 16 rows or more and a multiple of eight, a TPU's tile: of others the compiler gathers twice the
  bytes. `data` is the rest.
- **Rematerialisation** is "all" (keep everything) while that fits, "dots" (keep products and attention) to XL,
  "none" (keep only each layer's input) above: one forward pass more, a tenth of the memory.
- **Precision**: arithmetic in bfloat16, parameters and averages in float32; momentum in bfloat16 from 3B on.
"""

import dataclasses

from ml_collections import ConfigDict

from sora_jax.errors import UserError

VAES = {
    "vae-4x8x8": {
        "strides": ((2, 2, 2), (1, 2, 2), (2, 2, 2)),
        "channels": 16,
        "encoder_widths": (24, 64, 160),
        "encoder_blocks": (0, 1, 2),
        "decoder_widths": (32, 96, 160),
        "decoder_blocks": (1, 2, 3),
    },
    "vae-4x16x16": {
        "strides": ((2, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2)),
        "channels": 48,
        "encoder_widths": (32, 96, 192, 384),
        "encoder_blocks": (0, 1, 2, 2),
        "decoder_widths": (48, 128, 256, 512),
        "decoder_blocks": (1, 2, 3, 3),
    },
}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A model and the longest clips that it learns.

    Attributes:
      resolution, seconds, fps: of those clips, 16:9; shorter and smaller ones are learned too.
      vae: a name of `VAES`.
      patch: height and width of a token in latent cells.
      seq_len: N, a multiple of 128 that holds such a clip.
      text_len: M.
      batch_size: packed sequences of the global batch.
      shards: streams of data, as many as the parts that its slice splits a batch into.
      mesh: fsdp, tensor and sequence; data is the rest.
      remat: of the transformer's layers.
      steps: of training.
    """

    resolution: int
    seconds: float
    fps: float
    vae: str
    patch: int
    seq_len: int
    text_len: int
    batch_size: int
    shards: int
    mesh: tuple[int, int, int]
    remat: str
    steps: int


RUNGS = {
    # 64 px at 16:9 are 5 latent frames of 8 x 15 tokens: two of them a sequence.
    "Ti": Rung(64, 2.0, 8.0, "vae-4x8x8", 1, 1280, 256, 16, 1, (1, 1, 1), "all", 50_000),
    # 13 x 8 x 15 tokens.
    "S": Rung(128, 4.0, 12.0, "vae-4x8x8", 2, 2048, 256, 64, 8, (1, 1, 1), "all", 100_000),
    # 21 x 16 x 29: the first rung whose activations want rematerialisation on 16 GiB.
    "B": Rung(256, 5.0, 16.0, "vae-4x8x8", 2, 10_240, 512, 64, 32, (8, 1, 1), "dots", 200_000),
    # 41 x 15 x 27.
    "XL": Rung(480, 10.0, 16.0, "vae-4x16x16", 2, 17_408, 512, 128, 64, (16, 1, 1), "dots", 300_000),
    # 61 x 23 x 40: a sequence over two chips, so that one holds no more than 28,000 tokens.
    "3B": Rung(720, 10.0, 24.0, "vae-4x16x16", 2, 56_320, 512, 64, 64, (16, 1, 2), "none", 30_000),
    # 181 x 23 x 40: over eight.
    "7B": Rung(720, 30.0, 24.0, "vae-4x16x16", 2, 167_424, 512, 32, 32, (16, 1, 8), "none", 5_000),
    # 181 x 34 x 60: over sixteen, and two for its matrices' width.
    "14B": Rung(1080, 60.0, 12.0, "vae-4x16x16", 2, 370_176, 512, 16, 16, (8, 2, 16), "none", 2_000),
    # 361 x 34 x 60.
    "14B-24fps": Rung(1080, 60.0, 24.0, "vae-4x16x16", 2, 736_768, 512, 16, 16, (8, 1, 32), "none", 1_000),
}

# The slice of TPUs that each is planned for.
SLICES = {
    "Ti": "v5e:1x1",
    "S": "v5e:2x4",
    "B": "v5e:4x8",
    "XL": "v6e:8x8",
    "3B": "v5p:4x4x8",
    "7B": "v5p:4x8x8",
    "14B": "v5p:8x8x8",
    "14B-24fps": "v5p:8x8x8",
}


# Every part of a run, each as small as it goes; the text encoder is the one that needs no files.
DEBUG = {
    "steps": 10,
    "dit": {"size": "", "width": 32, "layers": 2, "heads": 2, "text_width": 32, "dtype": "float32"},
    "text": {"kind": "hash", "width": 32, "max_tokens": 32},
    "data": {"resolutions": (32,), "aspects": ("1:1",), "durations": (0.0, 1.0)},
    "latents": {"clips": 32},
    "pipeline": {"seq_len": 128, "text_len": 64, "batch_size": 2, "num_packing_bins": 4},
    "optim": {"warmup": 2},
    "log": {"every": 2, "heldout_every": 5, "heldout_batches": 2, "sheet_every": 10},
}


def get_config(name: str = "Ti") -> ConfigDict:
    if name == "debug":
        config = get_config("Ti")
        config.update(DEBUG)
        return config
    if name in VAES:
        return _autoencoder(name)
    if name not in RUNGS:
        raise UserError(f"No rung is called {name!r}: choose one of {', '.join([*RUNGS, *VAES, 'debug'])}.")
    rung, size = RUNGS[name], name.split("-")[0]
    fsdp, tensor, sequence = rung.mesh
    large = size in ("3B", "7B", "14B")
    cells = {"vae-4x8x8": 8, "vae-4x16x16": 16}[rung.vae] * rung.patch
    return ConfigDict(
        {
            "objective": "dit",
            "seed": 0,
            "steps": rung.steps,
            "autoencoder": "toyworld" if rung.vae == "vae-4x8x8" else f"runs/{rung.vae}",
            "init_from": "",
            "dit": {
                "size": size,
                "patch": (1, rung.patch, rung.patch),
                "channels": VAES[rung.vae]["channels"],
                "absolute": True,
                "pooled_text": True,
                "reference_frames": True,
                "dtype": "bfloat16",
                "remat": rung.remat,
                "sequence": "heads",  # all-to-alls: cheaper than "ring" while sequence x tensor divides the heads
            },
            "text": {
                "max_tokens": rung.text_len // 2
            },  # so that each sequence has room for two captions at least
            "flow": {"base_tokens": 32.0 if name == "Ti" else 256.0, "text_dropout": 0.1},
            "data": {
                "source": "toyworld" if name == "Ti" else "videos",
                "resolutions": (rung.resolution,),
                "aspects": ("16:9", "1:1", "9:16"),
                # Images, and clips of a quarter, half and all of the rung's seconds.
                "durations": (0.0, rung.seconds / 4, rung.seconds / 2, rung.seconds),
                "rates": (rung.fps,),
                "grid": (4, max(cells, 16), max(cells, 16)),  # whole patches
            },
            "latents": {"clips": 24_000 if name == "Ti" else 1_000_000, "batch": 16},
            "pipeline": {
                "seq_len": rung.seq_len,
                "text_len": rung.text_len,
                "batch_size": rung.batch_size,
                "shards": rung.shards,
                "num_packing_bins": max(2, min(64, 500_000 // rung.seq_len)),
                "max_segments": 16,
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
            },
            "optim": {
                "name": "adamw",
                "lr": 3e-4 if not large else 1e-4,
                "warmup": 1000,
                "schedule": "constant",
                "ema_decay": 0.9999,
                "momentum_dtype": "bfloat16" if large else "float32",
                "accumulate": 1,
                "offload": False,
            },
            "mesh": {"data": -1, "fsdp": fsdp, "tensor": tensor, "sequence": sequence},
            "log": {"every": 50},
            "checkpoint": {"every": 1000, "keep": 2},
            # Of the planner: one clip of the rung, and the autoencoder that decodes it.
            "video": {
                "resolution": rung.resolution,
                "aspect": "16:9",
                "seconds": rung.seconds,
                "fps": rung.fps,
                "steps": 50,
                "passes": 2,
                "vae": VAES[rung.vae],
            },
        }
    )


def _autoencoder(name: str) -> ConfigDict:
    return ConfigDict(
        {
            "objective": "vae",
            "seed": 0,
            "steps": 200_000,
            "init_from": "",
            "vae": VAES[name] | {"dtype": "bfloat16"},
            "loss": {
                "batch_size": 64,
                "shards": 1,
                "crop": (17, 128, 128) if name == "vae-4x8x8" else (9, 128, 128),
            },
            "data": {
                "source": "videos",
                "resolutions": (256, 480, 720),
                "durations": (2.0,),
                "rates": (24.0,),
            },
            "optim": {
                "name": "adamw",
                "lr": 1e-4,
                "warmup": 1000,
                "schedule": "constant",
                "ema_decay": 0.999,
                "momentum_dtype": "float32",
                "accumulate": 1,
                "offload": False,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "log": {"every": 50},
            "checkpoint": {"every": 1000, "keep": 2},
        }
    )
