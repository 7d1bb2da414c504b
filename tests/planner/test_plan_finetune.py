"""Plans of training on top of an open model: what a step holds, and its operations, as the program has them."""

import pathlib

import jax
import pytest
from click.testing import CliRunner
from helpers.tiny_finetune import tiny_config, write_base

from sora_jax.checkpoints.pretrained import load_pretrained
from sora_jax.cli.main import cli
from sora_jax.distributed.chips import read_topology
from sora_jax.errors import UserError
from sora_jax.planner.counts import count, estimate_counts
from sora_jax.planner.programs import build, estimate_memory, make_step_spec
from sora_jax.train.finetune import FinetuneObjective
from sora_jax.train.objectives import make_objective

HERE = read_topology("cpu:1")
MODELS = ("wan", "ltx")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("plan")


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("model", "weights"), [("wan", "bfloat16"), ("ltx", "int8")])
def test_what_a_lora_s_step_holds(place, model, weights):
    """The base once, in its own type, without gradients or averages; the optimizer's two moments of the LoRA alone."""
    config = tiny_config(place, 2, model, transformer__weights=weights)
    memory = estimate_memory(make_step_spec(config, "train", HERE)).memory
    objective = make_objective(config, place / "objective")
    assert isinstance(objective, FinetuneObjective)
    lora = bytes_of(objective.init(jax.random.key(0)))
    base = load_pretrained(objective.folder, weights=weights).dit
    assert memory["base"] == bytes_of(base) + 4 * 16  # the empty prompt's state
    assert memory["parameters"] == memory["average"] == lora
    assert memory["optimizer"] == pytest.approx(2 * lora, abs=64)


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_has_no_products_for_gradients_of_the_base(place, model):
    def spec(**changes):
        return make_step_spec(tiny_config(place, 2, model, **changes), "train", HERE)

    lora, whole = spec(), spec(lora__rank="0")
    assert estimate_counts(lora).products == pytest.approx(estimate_counts(whole).products * 2 / 3)
    assert estimate_memory(whole).memory["base"] < 1000  # the empty prompt's state


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rank", ["4", "0"])
def test_arithmetic_is_near_the_compiler(place, model, rank):
    spec = make_step_spec(
        tiny_config(place, 2, model, lora__rank=rank, transformer__remat="none"), "train", HERE
    )
    built = build(spec)
    by_compiler, by_arithmetic = count(built), estimate_counts(spec)
    assert by_compiler.products == pytest.approx(by_arithmetic.products + by_arithmetic.attention, rel=0.15)


def test_the_command_says_it_without_weights(place):
    folder = write_base(place / "settings", "ltx")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    words = ["plan", "--config", "finetune_ltx", "--topology", "h100:1", f"--config.pretrained={folder}"]
    small = ["--config.pipeline.seq_len=256", "--config.pipeline.text_len=256", "--config.lora.rank=4"]
    result = CliRunner().invoke(cli, [*words, *small, "-q"], catch_exceptions=False)
    assert "finetune_ltx: a train step of 1 sequences on h100:1" in result.output
    assert "  base " in result.output and "training: 512 ktokens" in result.output
    with pytest.raises(UserError, match="plan --model"):
        make_step_spec(tiny_config(place, 2), "sample", HERE)
