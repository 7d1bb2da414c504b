"""T5 and UMT5 against transformers' states (tools/parity/t5.py), streaming, files, and what is wrong with them."""

from __future__ import annotations

import gc
import json
import pathlib
import time
import tracemalloc
import weakref
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from seeded import draw
from t5_check import check, config_of, drawn

from sora_jax.errors import UserError
from sora_jax.models import prompts, t5
from sora_jax.models.prompts import clean_wan, load_tokenizer
from sora_jax.models.t5 import T5Config, T5Encoder, load_t5, position_buckets
from sora_jax.models.text import TextConfig, TextEncoder, load_text_encoder, text_digest
from sora_jax.models.weights import map_weights, read_weights, write_weights

ROOT = pathlib.Path(__file__).parents[2]
VARIANTS = ("tiny_umt5", "tiny_t5")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "moves", "left", "&", "Red"]


def golden(variant: str) -> dict[str, np.ndarray]:
    return dict(np.load(ROOT / "tests" / "golden" / f"t5_{variant}.npz"))


@pytest.fixture
def pipeline(tmp_path) -> pathlib.Path:
    """A pipeline's folder with the tiny UMT5, its weights in two files, and a tokenizer that cuts and pads."""
    arrays = golden("tiny_umt5")
    folder = tmp_path / "pipeline" / "text_encoder"
    folder.mkdir(parents=True)
    config_of(arrays, folder)
    weights = drawn(arrays)
    index = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(weights)}
    for file in set(index.values()):
        own = {name: tensor for name, tensor in weights.items() if index[name] == file}
        write_weights(own, folder / file, "float32")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_tokenizer(tmp_path / "pipeline" / "tokenizer")
    return tmp_path / "pipeline"


def save_tokenizer(folder: pathlib.Path, end: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if end:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(folder / "tokenizer.json"))


def settings(pipeline: pathlib.Path, **changed) -> TextConfig:
    return TextConfig(kind="t5", name=str(pipeline), **changed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_those_of_transformers(variant):
    arrays = golden(variant)
    errors = check(arrays)
    assert errors["states, float32"] <= 1e-4, errors
    assert errors["states that attend to padding"] <= 1e-4, errors
    assert 1e-4 < errors["states, bfloat16"] <= arrays["bfloat16_error"], errors


@pytest.mark.parametrize("variant", VARIANTS)
def test_distances_have_the_rows_of_transformers(variant, tmp_path):
    arrays = golden(variant)
    config = config_of(arrays, tmp_path)
    assert config.layer_positions == (variant == "tiny_umt5")
    before, after = position_buckets(601, config)[[600, 0]]  # distances -600 to 0, and 0 to 600
    np.testing.assert_array_equal([*before, *after[1:]], arrays["buckets"])


def test_the_last_position_may_see_the_first_and_no_padding(tmp_path):
    """Padding, other captions beside it and what stands in masked places change nothing."""
    arrays = golden("tiny_umt5")
    encoder = T5Encoder(config_of(arrays, tmp_path), drawn(arrays))
    ids, mask = arrays["ids"], arrays["mask"]
    together = encoder(ids, mask)
    for row, length in enumerate(mask.sum(1)):
        alone = encoder(ids[row : row + 1, :length], mask[row : row + 1, :length])[0]
        np.testing.assert_allclose(together[row, :length], alone, atol=1e-5)
    nothing = np.zeros_like(mask[:1])  # a row that pads the batch
    changed = encoder(np.concatenate([np.where(mask, ids, 9), ids[:1]]), np.concatenate([mask, nothing]))
    np.testing.assert_allclose(changed[:3][mask], together[mask], atol=1e-5)
    first = ids.copy()
    first[0, 0] = ids[0, 0] % 60 + 3
    assert np.abs(encoder(first, mask)[0, -1] - together[0, -1]).max() > 1e-3


def test_layers_from_files_give_what_all_at_once_give(pipeline):
    arrays = golden("tiny_umt5")
    config, weights = T5Config.from_file(pipeline / "text_encoder" / "config.json"), drawn(arrays)
    streamed = load_t5(pipeline / "text_encoder")(arrays["ids"], arrays["mask"])
    layers = [
        {name: weights[given] for name, (given, _) in config.layer_shapes(layer).items()}
        for layer in range(3)
    ]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    step = lambda x, layer: (t5._layer(layer, x, arrays["mask"], config, "float32"), None)
    states = jax.lax.scan(step, weights["shared.weight"][arrays["ids"]], stacked)[0]
    rms = np.sqrt(np.mean(np.square(states), -1, keepdims=True) + config.layer_norm_epsilon)
    np.testing.assert_allclose(
        streamed[arrays["mask"]],
        (states / rms * weights["encoder.final_layer_norm.weight"])[arrays["mask"]],
        atol=1e-5,
    )


def test_layers_are_read_once_for_all_lengths_and_kept_if_told(pipeline, monkeypatch):
    reads = []
    read = T5Encoder._read
    monkeypatch.setattr(
        T5Encoder, "_read", lambda self, name, out: reads.append(name) or read(self, name, out)
    )
    captions = ["a red ball", "a " * 40, "", "ball " * 20]
    streamed = load_text_encoder(settings(pipeline, cache_size=0))
    states = streamed.encode(captions)
    assert len(reads) == len(set(reads)) == 30
    streamed.encode(captions)
    assert len(reads) == 60
    kept = load_text_encoder(settings(pipeline, cache_size=0, keep_layers=True))
    for _ in range(2):
        for own, wanted in zip(kept.encode(captions), states, strict=True):
            np.testing.assert_array_equal(own, wanted)
    assert len(reads) == 90


def test_one_layer_is_in_memory_at_a_time_and_none_afterwards(tmp_path, monkeypatch):
    config = T5Config(vocab_size=8, d_model=256, d_kv=64, d_ff=1024, num_layers=8, num_heads=4)
    shapes = {"shared.weight": (8, 256), "encoder.final_layer_norm.weight": (256,)}
    for layer in range(8):
        shapes |= dict(config.layer_shapes(layer).values())
    write_weights(
        {name: draw(name, shape) for name, shape in shapes.items()}, tmp_path / "w.safetensors", "bfloat16"
    )
    encoder = T5Encoder(config, map_weights(tmp_path / "w.safetensors"))
    inputs = np.full((1, 4), 3), np.ones((1, 4), bool)
    encoder(*inputs)  # compiles
    size = sum(np.prod(shape) for _, shape in config.layer_shapes(0).values()) * 4  # bytes, as float32
    tracemalloc.start()
    encoder(*inputs)
    peak = tracemalloc.get_traced_memory()[1]  # of Python's objects and NumPy's arrays
    tracemalloc.stop()
    assert size < peak < 1.2 * size
    room = []
    aligned = t5._aligned
    monkeypatch.setattr(
        t5, "_aligned", lambda *like: room.append(weakref.ref(made := aligned(*like))) or made
    )
    encoder(*inputs)
    for _ in range(100):  # JAX's threads let go of it in their own time
        gc.collect()
        if all(memory() is None for memory in room):
            break
        time.sleep(0.1)
    assert len(room) == 10 and all(memory() is None for memory in room)


class Watched(np.ndarray):
    """An array that notes how many numbers were taken of it, and is never given whole."""

    taken: ClassVar[list[int]] = []

    def __getitem__(self, key):
        rows = np.asarray(super().__getitem__(key))
        self.taken.append(rows.size)
        return rows

    def __array__(self, *args, **kwargs):
        raise AssertionError("read whole")


def test_of_the_embedding_only_the_prompts_rows_are_read(tmp_path):
    arrays = golden("tiny_umt5")
    weights = drawn(arrays)
    weights["shared.weight"] = weights["shared.weight"].view(Watched)
    T5Encoder(config_of(arrays, tmp_path), weights)(arrays["ids"], arrays["mask"])
    assert Watched.taken == [arrays["ids"].size * 32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_files_of_narrow_weights_are_read_as_they_are(dtype, tmp_path):
    arrays = golden("tiny_t5")
    config, weights = config_of(arrays, tmp_path), drawn(arrays)
    write_weights(weights, tmp_path / "model.safetensors", dtype)
    kept = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rounded = {name: tensor.astype(kept).astype(np.float32) for name, tensor in weights.items()}
    inputs = arrays["ids"], arrays["mask"]
    own = load_t5(tmp_path)(*inputs)[arrays["mask"]]
    np.testing.assert_allclose(own, T5Encoder(config, rounded)(*inputs)[arrays["mask"]], atol=1e-5)
    states = arrays["states"][arrays["mask"]]
    if dtype == "bfloat16":  # weights alone are rounded: nearer than the original in bfloat16
        assert 1e-4 < np.abs(own - states).max() / states.std() < arrays["bfloat16_error"]


def test_a_table_has_either_name_and_the_encoders_own_comes_first(tmp_path):
    arrays = golden("tiny_t5")
    config, weights = config_of(arrays, tmp_path), drawn(arrays)
    table = weights.pop("shared.weight")
    states = lambda **tables: T5Encoder(config, weights | tables)(arrays["ids"], arrays["mask"])
    own, wanted = "encoder.embed_tokens.weight", states(**{"shared.weight": table})
    np.testing.assert_array_equal(states(**{own: table}), wanted)
    np.testing.assert_array_equal(states(**{own: table, "shared.weight": table + 1}), wanted)
    with pytest.raises(UserError, match="lacks 'shared.weight': fetch"):
        states()


def test_a_file_of_the_whole_model_is_read_without_its_decoder(tmp_path):
    arrays = golden("tiny_t5")
    config, weights = config_of(arrays, tmp_path), drawn(arrays)
    others = {name: np.zeros(3, np.float32) for name in ("decoder.final_layer_norm.weight", "lm_head.weight")}
    T5Encoder(config, weights | others)


def test_weights_that_do_not_fit_are_named(tmp_path):
    arrays = golden("tiny_umt5")
    config, weights = config_of(arrays, tmp_path), drawn(arrays)
    query = "encoder.block.1.layer.0.SelfAttention.q.weight"
    with pytest.raises(UserError, match="lacks 'encoder.block.1.layer.0.SelfAttention.k.weight' and 1 more"):
        T5Encoder(
            config,
            {n: t for n, t in weights.items() if "block.1.layer.0.SelfAttention" not in n or n[-8] in "ovs"},
        )
    with pytest.raises(UserError, match="holds more than config.json says, 'encoder.*q.weight_scale'"):
        T5Encoder(config, weights | {f"{query}_scale": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"q.weight' of shape \(32, 24\) where config.json says \(24, 32\)"):
        T5Encoder(config, weights | {query: weights[query].T})
    with pytest.raises(UserError, match="file holds 'encoder.*q.weight' as int8, which is no type"):
        T5Encoder(config, weights | {query: weights[query].astype(np.int8)})
    for outside in (64, -1):
        with pytest.raises(UserError, match=f"gives the token {outside} and the text encoder knows 64"):
            T5Encoder(config, weights)(np.array([[3, outside]]), np.ones((1, 2), bool))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model_type": "bert"}, "of a model of type 'bert'"),
        ({"model_type": None}, "of a model of type None"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
        ({"feed_forward_proj": None, "model_type": "t5"}, "feed_forward_proj 'relu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn 'gelu': only"),
        ({"is_decoder": True}, "is_decoder True"),
        ({"d_model": None}, "has no d_model"),
        ({"num_layers": "3"}, "num_layers '3', which is no number"),
        ({"d_kv": True}, "d_kv True, which is no number"),
    ],
)
def test_a_configuration_of_another_architecture_is_refused(changed, complaint, pipeline):
    path = pipeline / "text_encoder" / "config.json"
    given = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
    with pytest.raises(UserError, match=complaint):
        load_text_encoder(settings(pipeline))


def test_files_that_are_missing_or_damaged_are_named(pipeline):
    for name in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
        text = (pipeline / name).read_text()
        (pipeline / name).write_text(text[:-20])
        with pytest.raises(UserError, match=f"{name}.*fetch it again"):
            load_text_encoder(settings(pipeline))
        (pipeline / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            load_text_encoder(settings(pipeline))
        (pipeline / name).write_text(text)
    save_tokenizer(pipeline / "tokenizer", end=False)
    with pytest.raises(UserError, match="doesn't end prompts with the token 1"):
        load_text_encoder(settings(pipeline))
    (pipeline / "text_encoder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        load_text_encoder(settings(pipeline))
    with pytest.raises(UserError, match="config.json is missing"):
        load_text_encoder(TextConfig(kind="t5", name="nowhere"))


def test_captions_have_their_own_tokens_and_the_end(pipeline):
    encoder = load_text_encoder(settings(pipeline, max_tokens=20))
    states = encoder.encode(["a red ball", "", "a zebra"])
    assert [len(state) for state in states] == [4, 1, 3] and encoder.width == 32
    assert all(state.dtype == np.float32 for state in states)
    direct = load_t5(pipeline / "text_encoder")
    np.testing.assert_allclose(
        states[0], direct(np.array([[3, 4, 5, 1]]), np.ones((1, 4), bool))[0], atol=1e-5
    )
    with pytest.raises(UserError, match="has 31 tokens .* takes 20"):
        encoder.encode(["a " * 30])
    (cut,) = encoder.encode(["a " * 30], truncate=True)
    np.testing.assert_array_equal(cut, encoder.encode(["a " * 19])[0])
    assert encoder.cut == 1


def test_padding_that_is_attended_to_is_that_of_the_longest_caption(pipeline):
    masked, attended = (
        load_text_encoder(settings(pipeline, max_tokens=20, attend_padding=on)) for on in (False, True)
    )
    (state,) = attended.encode(["a red ball"])
    whole = load_t5(pipeline / "text_encoder")(np.array([[3, 4, 5, 1] + [0] * 16]), np.ones((1, 20), bool))[0]
    np.testing.assert_allclose(state, whole[:4], atol=1e-5)
    assert np.abs(state - masked.encode(["a red ball"])[0]).max() > 1e-2
    np.testing.assert_allclose(attended.encode(["", "a " * 12, "a red ball"])[2], state, atol=1e-5)


@pytest.fixture
def pieces(pipeline) -> pathlib.Path:
    """The pipeline's tokenizer as LTX-Video's folder has it."""
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    file = pipeline / "tokenizer" / "spiece.model"
    file.write_bytes(np.load(ROOT / "tests" / "golden" / "t5_sentencepiece.npz")["model"].tobytes())
    return file


def test_sentencepieces_file_is_read_as_sentencepiece_does(pieces, pipeline):
    arrays = np.load(ROOT / "tests" / "golden" / "t5_sentencepiece.npz")
    tokenizer = load_tokenizer(pipeline / "tokenizer")
    texts, ids = (json.loads(str(arrays[name])) for name in ("texts", "ids"))
    assert len(texts) == 6 and any(2 in own for own in ids)  # one has letters that are in no piece
    for text, own in zip(texts, ids, strict=True):
        assert tokenizer.encode(text).ids == own, text
    config = settings(pipeline)
    before = text_digest(config)
    pieces.write_bytes(pieces.read_bytes() + b"\x98\x06\x01")  # and a field that nothing reads
    assert text_digest(config) != before
    assert load_text_encoder(config).count_tokens("") == 1


def test_sentencepieces_file_that_is_damaged_is_refused(pieces, pipeline):
    whole = pieces.read_bytes()
    for damaged in (
        b"",
        whole[:-1],
        whole[: len(whole) // 2],
        b"\x0f" + whole,
        whole.replace(b"</s>", b"<//>"),
    ):
        pieces.write_bytes(damaged)
        with pytest.raises(UserError, match=r"spiece.model holds no tokenizer that can be read"):
            load_text_encoder(settings(pipeline))


def test_prompts_are_cleaned_as_the_original_does(pipeline):
    assert clean_wan("  a\n\tred &amp;amp; blue\u3000ball &lt;3 ") == "a red & blue ball <3"
    ids = lambda clean, caption: load_text_encoder(settings(pipeline, clean=clean))._tokenize(caption)
    assert ids("none", "a &amp; Red") == [3, 2, 9, 1]
    assert ids("wan", "a &amp; Red") == [3, 8, 9, 1]
    assert ids("lower", "a &amp; Red") == [3, 2, 4, 1]


def test_ftfy_repairs_prompts_where_it_is_installed(monkeypatch):
    class Ftfy:
        fix_text = staticmethod(lambda text: text.replace("â€™", "'"))

    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: name == "ftfy")
    monkeypatch.setattr(prompts.importlib, "import_module", lambda name: Ftfy)
    assert clean_wan("it&nbsp;â€™s") == "it 's"


def test_states_are_kept_on_disk_by_content(pipeline, tmp_path, monkeypatch):
    def encode(captions, kept=tmp_path / "kept", **changed):
        return load_text_encoder(settings(pipeline, **changed), kept_states=kept).encode(captions)

    captions = ["a red ball", "a " * 30]
    computed = []
    run = T5Encoder.encode
    monkeypatch.setattr(
        T5Encoder, "encode", lambda self, batches: computed.append(len(batches)) or run(self, batches)
    )
    wanted = encode(captions, None)
    for _ in range(2):
        for own, state in zip(encode(captions), wanted, strict=True):
            np.testing.assert_array_equal(own, state)
            assert not own.flags.writeable
    assert computed == [2, 2]  # the second time nothing is run
    files = sorted((tmp_path / "kept").rglob("*.npy"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1])  # damaged: computed again
    np.testing.assert_array_equal(encode(captions)[0], wanted[0])
    encode(captions, dtype="bfloat16")
    assert computed == [2, 2, 1, 2]


def test_another_encoder_or_tokenizer_has_another_name(pipeline):
    names = [text_digest(settings(pipeline)), text_digest(settings(pipeline, clean="wan"))]
    file = pipeline / "text_encoder" / "model-00001-of-00002.safetensors"
    write_weights({n: t * 1.01 for n, t in read_weights(file).items()}, file, "float32")
    names.append(text_digest(settings(pipeline)))
    save_tokenizer(pipeline / "tokenizer", end=False)
    names.append(text_digest(settings(pipeline)))
    assert len(set(names)) == 4
    assert text_digest(settings(pipeline)) == names[-1]


def test_settings_of_another_kind_are_refused():
    for wrong in ({"clean": "wan"}, {"attend_padding": True}, {"dtype": "bfloat16"}, {"keep_layers": True}):
        with pytest.raises(
            UserError, match=f"{next(iter(wrong))} is a setting of 't5', and its kind is 'bert'"
        ):
            TextConfig(**wrong)
    with pytest.raises(UserError, match="clean is 'ltx': choose one of none, wan, lower"):
        TextConfig(kind="t5", clean="ltx")
    assert TextEncoder.tiny().config.clean == "none"
