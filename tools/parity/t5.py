"""Golden arrays of transformers' UMT5 and T5 1.1 encoders, with weights that `draw` makes of their names.

    python tools/parity/t5.py OUT        # in an environment with torch and transformers; writes OUT/t5_VARIANT.npz

An npz has `config` (JSON of config.json), `names` (JSON of [name, shape] of the parameters), `versions` (JSON),
`ids` i[B,M], `mask` bool[B,M], `states` f32[B,M,E] (zero where masked), `states_attended` f32[M,E] (the second prompt
with its padding and without a mask, as diffusers' LTX pipeline calls it), `bfloat16_error` (of the same model in
bfloat16, maximum over the states' deviation) and `buckets`, which row of the table of positions holds for distances
-600 to 600. OUT/t5_sentencepiece.npz has a small tokenizer (`model`, the bytes of its spiece.model), `texts` and what
sentencepiece makes of them, `ids`.
"""

from __future__ import annotations

import io
import json
import pathlib
import sys

import numpy as np
import sentencepiece
import torch
import transformers
from seeded import draw

TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
XXL = {"vocab_size": 1000, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
VARIANTS = {
    "tiny_umt5": (transformers.UMT5EncoderModel, transformers.UMT5Config(**TINY, num_layers=3)),
    "tiny_t5": (transformers.T5EncoderModel, transformers.T5Config(**TINY, num_layers=2)),
    "xxl_umt5": (
        transformers.UMT5EncoderModel,
        transformers.UMT5Config(**XXL, feed_forward_proj="gated-gelu", num_layers=2),
    ),
}
TEXTS = [
    "",
    "A red ball bounces off the wall, then rolls away.",
    "  two   spaces\tand a tab\nand a line ",
    "the ﬁnal Ａ is ½ full…　done",
    "zebras and quartz: unseen ☃ letters żółć 猫狗 QX",
    "a cat bakes a cake; the cake is red, the cat is not",
]
LENGTHS = {"tiny_umt5": (160, 33, 1), "tiny_t5": (160, 33, 1), "xxl_umt5": (40, 24)}


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for variant, (model_class, config) in VARIANTS.items():
        np.savez_compressed(out / f"t5_{variant}.npz", **golden(model_class, config, LENGTHS[variant]))
    np.savez_compressed(out / "t5_sentencepiece.npz", **tokenizer())


@torch.no_grad()
def golden(
    model_class: type, config: transformers.PretrainedConfig, lengths: tuple[int, ...]
) -> dict[str, object]:
    model = model_class(config).eval()
    names = [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(draw(name, parameter.shape)))
    generator = np.random.default_rng(0)
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids = np.where(mask, generator.integers(2, config.vocab_size, mask.shape), config.pad_token_id)
    inputs = torch.from_numpy(ids)
    attention = model.encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(-600, 601)
    if isinstance(config, transformers.UMT5Config):
        buckets = attention._relative_position_bucket(distances)
    else:
        buckets = attention._relative_position_bucket(distances, True, 32, 128)

    def states(model: torch.nn.Module, mask: np.ndarray | None) -> np.ndarray:
        attended = None if mask is None else torch.from_numpy(mask.astype(np.int64))
        found = model(inputs, attention_mask=attended).last_hidden_state.float().numpy()
        return found if mask is None else found * mask[..., None]

    exact, attended = states(model, mask), states(model, None)[1]
    rounded = states(model.to(torch.bfloat16), mask)
    arrays = {
        "states": exact,
        "states_attended": attended,
        "bfloat16_error": np.abs(rounded - exact).max() / exact[mask].std(),
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    texts = {
        "config": config.to_json_string(use_diff=False),
        "names": json.dumps(names),
        "versions": json.dumps(versions),
    }
    return {
        "ids": ids.astype(np.int32),
        "mask": mask,
        "buckets": buckets.numpy().astype(np.int32),
        **arrays,
        **texts,
    }


def tokenizer() -> dict[str, object]:
    """A unigram model with T5's special tokens; its normaliser is a few rules of NFKC, whose whole takes 240 kB."""
    rules = pathlib.Path("/tmp/t5_rules.tsv")
    spaced = {0x3000: " ", 0xA0: " ", 0x9: " ", 0xA: " "}
    letters = {0xFB01: "fi", 0xFF21: "A", 0xBD: "1/2", 0x2026: "..."}
    lines = [f"{a:X}\t{' '.join(f'{ord(c):X}' for c in b)}" for a, b in (spaced | letters).items()]
    rules.write_text("\n".join(lines) + "\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS if "unseen" not in text] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=80,
        normalization_rule_tsv=str(rules),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = [[*processor.encode(text), processor.eos_id()] for text in TEXTS]
    return {
        "model": np.frombuffer(model.getvalue(), np.uint8),
        "texts": json.dumps(TEXTS),
        "ids": json.dumps(ids),
        "versions": json.dumps({"sentencepiece": sentencepiece.__version__}),
    }


if __name__ == "__main__":
    main()
