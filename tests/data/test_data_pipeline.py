"""The latent cache and the streams that training reads: whole, disjoint, resumable."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import pickle
import signal
import time

import grain
import jax
import numpy as np
import pytest
from helpers.packed import pack_stream
from helpers.records import SHAPES, Encoder, Numbers, records

from sora_jax.data.latents import LatentCache, write_latents
from sora_jax.data.pipeline import (
    SEGMENT_CONDITIONS,
    Miscaptioned,
    PipelineConfig,
    clip_batches,
    draw_segment,
    make_pipeline,
)
from sora_jax.distributed.mesh import Share
from sora_jax.errors import UserError
from sora_jax.media.clip import Clip
from sora_jax.media.video import Video
from sora_jax.train.stopping import terminations

CONFIG = PipelineConfig(seq_len=64, text_len=40, batch_size=2, max_segments=8, num_packing_bins=8)


def share(host: int, hosts: int) -> Share:
    """Host number `host` of `hosts` that have equal parts of the sequences."""
    return Share(tuple((part,) for part in range(hosts)), hosts, host)


def write(folder: pathlib.Path, count: int = 30, encode=None, source=None, **options) -> LatentCache:
    options = {"fingerprint": "vae 1", "batch": 4, "progress": False} | options
    return write_latents(source or Numbers(count), encode or Encoder(), folder, clips=count, **options)


def numbers(batch) -> list[int]:
    """Which clips a batch of `records` holds: the value of each segment's first number."""
    firsts = []
    for row, ids in zip(batch.patches, batch.segment_ids, strict=True):
        firsts += [int(row[ids == segment][0, 0]) for segment in range(1, ids.max() + 1)]
    return firsts


def assert_same(batch, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_the_cache_gives_back_what_was_encoded(tmp_path):
    encode = Encoder()
    cache = write(tmp_path / "cache", encode=encode)
    assert len(cache) == 30 and cache.fingerprint == "vae 1"
    for stored, wanted in zip(cache, records(30), strict=True):
        assert_same(stored, wanted)
        assert stored["latent"].dtype == np.float16
    assert {shape[0] for shape in encode.shapes} == {4} and len(set(encode.shapes)) == len(SHAPES)
    everything = np.concatenate([r["latent"].reshape(-1, 4).astype(np.float64) for r in records(30)])
    np.testing.assert_allclose(cache.mean, everything.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(cache.std, everything.std(axis=0), rtol=1e-6)
    assert_same(pickle.loads(pickle.dumps(cache))[7], cache[7])


def test_a_finished_cache_is_not_written_again(tmp_path):
    write(tmp_path)
    again = Encoder()
    write(tmp_path, encode=again)
    assert not again.shapes
    with pytest.raises(UserError, match="holds 30 latents of 'vae 1', not 30 of 'vae 2'"):
        write(tmp_path, fingerprint="vae 2")
    with pytest.raises(UserError, match="not 20 of 'vae 1'"):
        write(tmp_path, count=20)


def test_two_jobs_that_want_the_same_cache_encode_it_once(tmp_path, capfd):
    """As two runs of a sweep do: the second waits, and finds it finished."""

    class Slow(Encoder):
        def __call__(self, clips):
            time.sleep(0.05)
            return super().__call__(clips)

    encoders = [Slow(), Slow()]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        caches = [*pool.map(lambda encode: write(tmp_path, encode=encode), encoders)]
    assert sorted(bool(encode.shapes) for encode in encoders) == [False, True]
    for one, other in zip(*caches, strict=True):
        assert_same(one, other)
    assert "another process is encoding the clips" in capfd.readouterr().err


def test_an_interrupted_cache_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.data.latents._CLIPS_PER_SHARD", 8)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, source=Numbers(30, broken=20))
    with pytest.raises(UserError, match="no finished latent cache"):
        LatentCache(tmp_path)
    encode = Encoder()
    resumed = write(tmp_path, encode=encode)
    assert len(encode.shapes) == 2 * len(SHAPES)  # the last two of four shards
    for stored, wanted in zip(resumed, write(tmp_path / "whole"), strict=True):
        assert_same(stored, wanted)


class Stopped(Encoder):
    """Is told to stop by a signal in its fourth batch."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def __call__(self, clips):
        if len(self.shapes) == 3:
            signal.raise_signal(self.number)
        return super().__call__(clips)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_shard_keeps_the_batches_that_are_done(tmp_path, number, torn):
    # A shell's background job ignores SIGINT, and so would the test in it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminations(), pytest.raises(KeyboardInterrupt):
            write(tmp_path / "cache", encode=Stopped(number))
    finally:
        signal.signal(signal.SIGINT, before)
    [part] = (tmp_path / "cache").iterdir()
    if torn:  # as by a kill while it was written
        part.write_bytes(part.read_bytes()[:-5])
    rest, whole = Encoder(), Encoder()
    resumed = write(tmp_path / "cache", encode=rest)
    uninterrupted = write(tmp_path / "whole", encode=whole)
    assert sorted(rest.shapes) == sorted(whole.shapes[3 - torn :]) and len(whole.shapes) == 8
    for stored, wanted in zip(resumed, uninterrupted, strict=True):
        assert_same(stored, wanted)
    assert not part.exists() and len(list(part.parent.iterdir())) == 2


def test_hosts_deal_the_caches_shards_out(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.data.latents._CLIPS_PER_SHARD", 8)
    write(tmp_path / "alone")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("sora_jax.data.latents._PATIENCE", 0)
    for name in ("barrier", "assert_equal_across_hosts"):
        monkeypatch.setattr(f"sora_jax.data.latents.{name}", lambda *arguments: None)
    encodes = {1: Encoder(), 0: Encoder()}
    for host, encode in encodes.items():
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        # Without barriers host 1 is too early to find the cache finished.
        with contextlib.suppress(UserError) if host else contextlib.nullcontext():
            write(tmp_path / "both", encode=encode)
    assert [len(encode.shapes) for encode in encodes.values()] == [2 * len(SHAPES)] * 2
    for stored, wanted in zip(LatentCache(tmp_path / "both"), LatentCache(tmp_path / "alone"), strict=True):
        assert_same(stored, wanted)


def test_an_interrupted_cache_of_another_encoder_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.data.latents._CLIPS_PER_SHARD", 8)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, source=Numbers(30, broken=20))
    encode = Encoder()
    write(tmp_path, encode=encode, fingerprint="vae 2")
    assert len(encode.shapes) == 4 * len(SHAPES)
    assert len(list(tmp_path.iterdir())) == 4 + 1


def test_what_is_wrong_with_a_cache_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no finished latent cache"):
        LatentCache(tmp_path / "nowhere")
    with pytest.raises(UserError, match="31 clips can't be encoded: the data set has 30"):
        write(tmp_path, source=Numbers(30), count=31)

    def diverged(clips):
        return [Encoder.record(clip) | {"latent": np.full((1, 2, 2, 4), np.inf)} for clip in clips]

    with pytest.raises(UserError, match="'clip-0' is not finite"):
        write(tmp_path, encode=diverged)
    assert not list(tmp_path.iterdir())
    cache = write(tmp_path)
    next(cache.folder.glob("*.arrayrecord")).unlink()
    with pytest.raises(UserError, match="is missing: delete the rest"):
        LatentCache(tmp_path)


def test_a_caches_latents_enter_as_they_are_and_its_statistics_are_theirs(tmp_path):
    cache = write(tmp_path)
    total, squares, count = 0.0, 0.0, 0
    for batch in make_pipeline(CONFIG, tmp_path, epochs=1):
        tokens = batch.patches[batch.segment_ids > 0].reshape(-1, 4, 4)
        total, squares, count = (
            total + tokens.sum((0, 1)),
            squares + (tokens**2).sum((0, 1)),
            count + len(tokens) * 4,
        )
        assert batch.patches.dtype == batch.text.dtype == np.float32 and not batch.conditioning_mask.any()
        np.testing.assert_array_equal(batch.init_sigma, batch.segment_ids > 0)
    assert count == sum(record["latent"][..., 0].size for record in cache)
    np.testing.assert_allclose(total / count, cache.mean, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(squares / count - (total / count) ** 2), cache.std, atol=1e-4)


@pytest.mark.parametrize("hosts", [1, 3, 4])
def test_every_epoch_is_dealt_out_whole(hosts):
    config = dataclasses.replace(CONFIG, shards=12, batch_size=12)

    def shares(epochs: int) -> list[list[int]]:
        streams = [make_pipeline(config, records(30), share(host, hosts), epochs) for host in range(hosts)]
        return [[number for batch in stream for number in numbers(batch)] for stream in streams]

    assert sorted(itertools.chain(*shares(1))) == list(range(30))
    assert sorted(itertools.chain(*shares(3))) == sorted([*range(30)] * 3)


def test_every_epoch_has_another_order():
    one_run_a_row = dataclasses.replace(CONFIG, max_segments=1, num_packing_bins=1, batch_size=1)
    order = [
        number for batch in make_pipeline(one_run_a_row, records(30), epochs=2) for number in numbers(batch)
    ]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:] and order[:30] != list(range(30))


def test_the_pipeline_is_deterministic_and_follows_its_seed():
    def take(seed):
        stream = iter(make_pipeline(dataclasses.replace(CONFIG, seed=seed), records(30)))
        return [next(stream) for _ in range(5)]

    first, again, other = take(0), take(0), take(1)
    for batch, same in zip(first, again, strict=True):
        assert_same(batch, same)
    assert [numbers(b) for b in first] != [numbers(b) for b in other]


@pytest.mark.parametrize("taken", [0, 1, 6])
def test_the_pipeline_resumes_to_the_bit(tmp_path, taken):
    config = dataclasses.replace(CONFIG, shards=4, batch_size=8)
    write(tmp_path)
    stream = iter(make_pipeline(config, tmp_path, share(1, 2)))
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = [next(stream) for _ in range(12)]
    resumed = iter(make_pipeline(config, tmp_path, share(1, 2)))
    resumed.set_state(state)
    for batch in wanted:
        assert_same(next(resumed), batch)


def joined(batches: list) -> list:
    """The hosts' parts of each step's batch, side by side."""
    return [jax.tree.map(lambda *parts: np.concatenate(parts), *step) for step in zip(*batches, strict=True)]


def test_the_global_batch_is_the_same_on_any_number_of_hosts():
    config, data = dataclasses.replace(CONFIG, shards=4, batch_size=8), records(30)

    def take(hosts: int) -> list:
        streams = [iter(make_pipeline(config, data, share(host, hosts))) for host in range(hosts)]
        return joined([[next(stream) for _ in range(6)] for stream in streams])

    alone = take(1)
    for hosts in (2, 4):
        for batch, same in zip(take(hosts), alone, strict=True):
            assert_same(batch, same)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 4), (1, 2), (4, 1)])
def test_a_stream_goes_on_with_another_number_of_hosts(before, after):
    config, data = dataclasses.replace(CONFIG, shards=4, batch_size=8), records(30)
    whole = iter(make_pipeline(config, data, epochs=3))
    wanted = list(whole)
    streams = [iter(make_pipeline(config, data, share(host, before), 3)) for host in range(before)]
    first = joined([[next(stream) for _ in range(2)] for stream in streams])
    states = [json.loads(json.dumps(stream.get_state()))["shards"] for stream in streams]
    table = {"shards": {shard: own for state in states for shard, own in state.items()}}
    assert list(table["shards"]) == ["0", "1", "2", "3"]
    streams = [iter(make_pipeline(config, data, share(host, after), 3)) for host in range(after)]
    for stream in streams:
        stream.set_state(table)
    rest = joined([[next(stream) for _ in wanted[2:]] for stream in streams])
    for batch, same in zip([*first, *rest], wanted, strict=True):
        assert_same(batch, same)
    # No clip was skipped and none was read twice: three epochs are three times every clip.
    read = [number for batch in [*first, *rest] for number in numbers(batch)]
    assert sorted(read) == sorted([*range(30)] * 3)


def test_one_shard_is_one_packed_stream():
    data = records(30)
    segments = grain.MapDataset.source(data).shuffle(seed=CONFIG.seed).repeat()
    segments = segments.random_map(
        functools.partial(draw_segment, config=CONFIG), seed=CONFIG.seed
    ).to_iter_dataset()
    alone = iter(pack_stream(segments, 64, 40, 8, 2, CONFIG.num_packing_bins, SEGMENT_CONDITIONS))
    stream = iter(make_pipeline(CONFIG, data))
    for _ in range(5):
        assert_same(next(stream), next(alone))
    stream.set_state({"shards": {"0": alone.get_state()}})
    for _ in range(5):
        assert_same(next(stream), next(alone))


def test_shards_that_do_not_fit_are_told():
    with pytest.raises(
        UserError, match="batch_size=2 can.t be split evenly over config.pipeline.shards=3 sh"
    ):
        make_pipeline(dataclasses.replace(CONFIG, shards=3), records(30))
    with pytest.raises(UserError, match="shards=3 .* the 2 hosts .* use 1 or 3 of them, .* a multiple of 2"):
        make_pipeline(dataclasses.replace(CONFIG, shards=3, batch_size=3), records(30), share(0, 2))
    two = dataclasses.replace(CONFIG, shards=2)
    state = iter(make_pipeline(two, records(30), share(0, 2))).get_state()
    with pytest.raises(UserError, match="data of 1 shards, and none of shard 1"):
        iter(make_pipeline(two, records(30))).set_state(state)


def test_captions_are_drawn_by_weight():
    def kinds(weights) -> np.ndarray:
        config = dataclasses.replace(CONFIG, caption_weights=weights)
        stream = iter(make_pipeline(config, records(30)))
        text = np.concatenate(
            [batch.text[batch.text_segment_ids > 0][:, 0] for batch, _ in zip(stream, range(30))]
        )
        return np.unique(text)

    assert list(kinds({"short": 1.0})) == [1]
    assert list(kinds({"detailed": 2.0, "timed": 1.0})) == [3]
    assert list(kinds({})) == [1, 3]
    with pytest.raises(
        UserError, match="captions of the kinds detailed, short, but the pipeline wants timed"
    ):
        kinds({"timed": 1.0})


def test_the_pipeline_says_what_does_not_fit():
    with pytest.raises(UserError, match="no records to train on"):
        make_pipeline(CONFIG, [])
    with pytest.raises(UserError, match="has 2 tokens and . text tokens, but a sequence holds 1 and 40"):
        next(iter(make_pipeline(dataclasses.replace(CONFIG, seq_len=1), records(8))))
    with pytest.raises(UserError, match=r"text tokens, but a sequence holds 64 and 2"):
        next(iter(make_pipeline(dataclasses.replace(CONFIG, text_len=2), records(8))))


def test_a_clip_longer_than_a_row_is_read_in_windows_of_its_time():
    narrow, given = dataclasses.replace(CONFIG, seq_len=3, max_segments=1), records(30)
    begins = set()
    for batch, _ in zip(make_pipeline(narrow, given), range(40)):
        for row, ids in zip(range(2), batch.segment_ids, strict=True):
            record = given[int(batch.patches[row, 0, 0])]
            a_frame = record["latent"][0, ..., 0].size // 4
            whole, frames = len(record["latent"]), (ids > 0).sum() / a_frame
            assert frames == whole or 1 <= frames <= 3 // a_frame
            coords = batch.coords[row, ids > 0]
            assert coords[0, 0] == 0 and np.ptp(coords[:, 0]) == (frames - 1) / 2
            begins.add((whole, frames, float(coords[0, 3])))  # 0: the clip's first frame, 0.5: a later group
    assert {(3, 3.0, 0.0), (2, 1.0, 0.0), (2, 1.0, 0.5)} <= begins


def test_a_single_record_makes_a_stream():
    batch = next(iter(make_pipeline(CONFIG, records(1))))
    assert (batch.segment_ids.max(axis=1) == 8).all()


def test_clip_batches_are_windows_of_the_clips():
    stream = iter(clip_batches(Numbers(20), batch_size=4, shape=(1, 8, 12), seed=3))
    seen = []
    for _ in range(5):
        clip = next(stream)["clip"]
        assert clip.shape == (4, 1, 8, 12, 3) and clip.dtype == np.uint8
        seen += [int(number) for number in clip[:, 0, 0, 0, 0]]
    assert sorted(seen) == list(range(20)) and seen != sorted(seen)
    other = next(iter(clip_batches(Numbers(20), batch_size=4, shape=(1, 8, 12), seed=4)))["clip"]
    assert list(other[:, 0, 0, 0, 0]) != seen[:4]
    with pytest.raises(UserError, match="smaller than the crop of 9×16×16"):
        for _ in range(5):
            next(iter(clip_batches(Numbers(3), batch_size=3, shape=(9, 16, 16))))


def test_clip_batches_mix_by_weight_and_are_dealt_out():
    class Shifted(Numbers):
        def __getitem__(self, index: int) -> Clip:
            clip = super().__getitem__(index)
            return Clip(Video(clip.video.frames + 100, 8.0), clip.captions, (), clip.key)

    sources = [(Numbers(12), 3.0), (Shifted(4), 1.0), (Numbers(5, broken=0), 0.0)]
    seen = []
    for host in range(2):
        stream = iter(clip_batches(sources, 8, (1, 8, 8), shards=2, share=share(host, 2)))
        own = np.concatenate([next(stream)["clip"][:, 0, 0, 0, 0] for _ in range(2)])
        assert sum(number >= 100 for number in own) == 2
        seen += [int(number) for number in own]
    assert sorted(seen) == [*range(12), *range(100, 104)]
    with pytest.raises(UserError, match="no clips to train on"):
        clip_batches([(Numbers(12), 0.0)], 4, (1, 8, 8))


def test_clip_batches_resume_to_the_bit():
    class Noise(Numbers):
        def __getitem__(self, index: int) -> Clip:
            frames = np.random.default_rng(index).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
            return Clip(Video(frames, 8.0), {"short": ""}, (), str(index))

    stream = iter(clip_batches(Noise(20), 3, (3, 8, 8)))
    for _ in range(4):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    resumed = iter(clip_batches(Noise(20), 3, (3, 8, 8)))
    resumed.set_state(state)
    for _ in range(9):
        assert_same(next(resumed), next(stream))


def test_a_share_of_clips_has_another_clips_captions_by_seed():
    sources = [{"key": key, "captions": {"short": key}} for key in range(400)]
    found = [
        record["captions"]["short"] for record in map(Miscaptioned(sources, 0.3, 0).__getitem__, range(400))
    ]
    wrong = [caption != key for key, caption in enumerate(found)]
    assert 0.2 < np.mean(wrong) < 0.4 and len(set(found)) > 300
    again, other = (
        [Miscaptioned(sources, 0.3, seed)[index]["captions"]["short"] for index in range(400)]
        for seed in (0, 1)
    )
    assert again == found != other
    assert [record["key"] for record in map(Miscaptioned(sources, 1.0, 0).__getitem__, range(400))] == [
        *range(400)
    ]
    assert Miscaptioned(sources[:1], 1.0, 0)[0] == sources[0], "there is no other"
    assert len([*make_pipeline(dataclasses.replace(CONFIG, caption_noise=1.0), records(4), epochs=1)]) > 0


def test_a_batch_of_a_bucket_is_of_one_shape():
    config = dataclasses.replace(CONFIG, batch_size=1, buckets=True)
    held = []
    for batch in make_pipeline(config, records(30), epochs=1):
        found = numbers(batch)
        held += found
        assert len({SHAPES[number % len(SHAPES)] for number in found}) == 1
    assert sorted(held) == [*range(30)]
