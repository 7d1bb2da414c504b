"""Models on the hub: found in the cache, fetched where they aren't whole, and a sentence where there is no network."""

import json
import pathlib

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from sora_jax.checkpoints.hub import missing_files, resolve
from sora_jax.errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cached model, and what the hub was asked; `net` is what a download does."""
    asked: list[dict] = []
    cached = tmp_path / "snapshot"
    (cached / "transformer").mkdir(parents=True)
    (cached / "model_index.json").write_text("{}")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (cached / "transformer" / "x.safetensors.index.json").write_text(json.dumps(index))
    for shard in ("one", "two"):
        (cached / "transformer" / f"{shard}.safetensors").write_bytes(b"")

    def download(repository: str, **options):
        asked.append({"repository": repository, **options})
        if options["local_files_only"] and not (cached / "model_index.json").is_file():
            raise LocalEntryNotFoundError("nothing is cached")
        if not options["local_files_only"]:
            hub.net()
        return str(cached)

    def offline():
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = type("Hub", (), {"asked": asked, "cached": cached, "net": staticmethod(offline)})()
    return hub


def test_a_whole_cache_is_taken_without_the_network(hub):
    assert resolve("hf:team/model@v1") == hub.cached
    (asked,) = hub.asked
    assert (asked["repository"], asked["revision"], asked["local_files_only"]) == ("team/model", "v1", True)
    names = ["model_index.json", "vae/config.json", "vae/model.safetensors", "tokenizer/spiece.model"]
    others = ["vae/model.bin", "original.pth", "ltxv-13b-0.9.7.safetensors"]
    fetched = huggingface_hub.utils.filter_repo_objects(
        names + others, allow_patterns=asked["allow_patterns"]
    )
    assert list(fetched) == names


def test_a_cache_that_lacks_a_shard_is_completed(hub):
    shard = hub.cached / "transformer" / "two.safetensors"
    shard.unlink()
    assert missing_files(hub.cached) == ["transformer/two.safetensors"]
    hub.net = lambda: shard.write_bytes(b"")
    assert resolve("hf:team/model") == hub.cached
    assert [asked["local_files_only"] for asked in hub.asked] == [True, False]


def test_without_a_network_it_is_said(hub):
    (hub.cached / "model_index.json").unlink()
    with pytest.raises(UserError, match="team/model is not in the hub's cache and can't be fetched"):
        resolve("hf:team/model")


def test_a_model_without_a_part_is_refused(hub):
    (hub.cached / "transformer" / "one.safetensors").unlink()
    hub.net = lambda: None
    with pytest.raises(UserError, match="without transformer/one.safetensors"):
        resolve("hf:team/model")


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:a/b/c", "hf:../../etc/passwd", "hf:a/b@"])
def test_names_that_are_none_are_refused(name, hub):
    with pytest.raises(UserError, match="names no model on the hub"):
        resolve(name)
    assert not hub.asked


def test_other_names_are_left_alone(hub):
    assert resolve("toyworld") == "toyworld"
    assert resolve(pathlib.Path("runs/x")) == pathlib.Path("runs/x")
    assert not hub.asked
