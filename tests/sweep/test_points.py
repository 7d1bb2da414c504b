"""From a sweep's file to checked configurations: strict on every key, named by what a result depends on."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib

import pytest

from sora_jax.errors import UserError
from sora_jax.evaluation.abilities import TRIALS, evaluate_abilities
from sora_jax.evaluation.report import evaluate_toyworld
from sora_jax.pipeline.settings import Settings
from sora_jax.sweep.algebra import arms, param, product, seeds
from sora_jax.sweep.evaluations import TAKES, evaluation
from sora_jax.sweep.measure import KINDS, loss
from sora_jax.sweep.points import Sweep, load, loss_config, name_of, resolve, training_config
from sora_jax.train.__main__ import make_config

SIZES = arms("sizes", {"fixed": {}, "native": {"data.resolutions": (32, 64)}})


def make(**fields) -> Sweep:
    return Sweep(**{"base": "toyworld_dit:quick", "points": product(SIZES, seeds(2))} | fields)


def test_a_point_is_what_the_same_flags_of_a_training_command_give():
    points = resolve(make(fixed={"steps": 50}), {"optim.lr": "1e-3"})
    assert [point.title for point in points] == [
        "fixed, seed 0",
        "fixed, seed 1",
        "native, seed 0",
        "native, seed 1",
    ]
    last = points[3]
    assert last.config.to_dict() == make_config("toyworld_dit:quick", last.overrides).to_dict()
    assert last.config.data.resolutions == (32, 64) and last.config.seed == last.config.pipeline.seed == 1
    assert (last.config.steps, last.config.optim.lr) == (50, 1e-3)
    assert last.common.data.resolutions == (64,) and last.common.steps == 50


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "data.resolution",
            (64,),
            "config.data.resolution is no key .* did you mean config.data.resolutions?",
        ),
        ("dit.patch", (1, 2), "config.dit.patch takes 3 whole numbers"),
        ("flow.text_dropout", 2.0, "config.flow.text_dropout=2.0 must be from 0 to 1"),
        ("pipeline.canvases", {"frist": 1.0}, "config.pipeline.canvases.frist is no key"),
        ("pipeline.row_tokens", 640, "config.pipeline.row_tokens is called config.pipeline.seq_len now"),
    ],
)
@pytest.mark.parametrize("where", ["point", "fixed", "loss"])
def test_a_field_that_does_not_exist_is_refused_before_anything_runs(key, value, words, where):
    own = {
        "point": {"points": arms("x", {"right": {}, "wrong": {key: value}})},
        "fixed": {"fixed": {key: value}},
        "loss": {"evaluations": [evaluation("loss", overrides={key: value})]},
    }[where]
    with pytest.raises(UserError, match=words) as caught:
        resolve(make(**own))
    assert ("x=wrong" in str(caught.value)) == (where == "point")


def test_the_command_line_sets_what_is_fixed_and_not_what_varies():
    assert resolve(make(fixed={"steps": 50}), {"steps": "70"})[0].config.steps == 70
    with pytest.raises(UserError, match="config.data.resolutions is what the sweep varies"):
        resolve(make(), {"data.resolutions": "96"})


def test_one_run_under_two_names_is_refused_and_under_one_name_made_once():
    with pytest.raises(UserError, match="'fixed' and 'also' are the same run under two names"):
        resolve(make(points=arms("sizes", {"fixed": {}, "also": {"data.resolutions": (64,)}})))
    assert len(resolve(make(points=SIZES + SIZES))) == 2


def test_the_key_is_of_all_that_the_result_depends_on():
    [first, *_] = resolve(make())
    folders = [first.config.to_dict()["latents"] | {"folder": folder} for folder in ("", "elsewhere")]
    same = [dataclasses.replace(first, config=_with(first.config, latents=one)) for one in folders]
    assert {point.key for point in same} == {first.key}
    others = {
        resolve(make(), {"optim.b2": "0.9"})[0].key,
        resolve(make(evaluations=[evaluation("loss")]))[0].key,
        resolve(make(evaluations=[evaluation("loss", clips=9)]))[0].key,
        *(point.key for point in resolve(make())[1:]),
    }
    assert len(others) == 6 and first.key not in others
    # What is measured doesn't change what is trained.
    measured = resolve(make(evaluations=[evaluation("loss")]))[0]
    assert measured.folder == first.folder and measured.sweep_key != first.sweep_key


def test_a_field_that_is_as_by_default_is_not_in_the_key():
    """So runs stay finished when the package gets new fields."""
    [first, *_] = resolve(make())
    pipeline = first.config.to_dict()["pipeline"]
    older = first.config.copy_and_resolve_references()
    del older.pipeline["threads"]
    assert dataclasses.replace(first, config=older, common=older).key == first.key
    changed = _with(first.config, pipeline=pipeline | {"threads": 7})
    assert dataclasses.replace(first, config=changed).key != first.key


def _with(config, **sections):
    changed = config.copy_and_resolve_references()
    changed.update(sections)
    return changed


def test_runs_that_read_the_same_clips_share_their_latents(tmp_path):
    points = resolve(make(points=product(SIZES, param("optim.lr", [1e-3, 2e-3]))))
    folders = [training_config(point, tmp_path).latents.folder for point in points]
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert {str(pathlib.Path(folder).parent) for folder in folders} == {str(tmp_path)}


def test_the_loss_is_measured_on_the_same_clips_by_each_runs_own_model():
    point = resolve(make(), {"flow.text_dropout": "0.3"})[2]
    point.config.dit.patch = (1, 1, 1)
    point.config.pipeline.seq_len = 2048
    config = loss_config(point.common, point.config, {"data.durations": (3.0,)}, ("pipeline.seq_len",))
    assert (config.data.resolutions, config.data.durations) == ((64,), (3.0,))
    assert (config.dit.patch, config.pipeline.seq_len, config.flow.text_dropout) == ((1, 1, 1), 2048, 0.0)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("fvd", {}, "There is no evaluation 'fvd' for a sweep: choose one of toyworld, abilities, loss"),
        ("toyworld", {"clip": 3}, "takes no 'clip': did you mean 'clips'?"),
        ("toyworld", {"split": "test"}, "Toyworld has no split 'test'"),
        (
            "abilities",
            {"names": ("animat",)},
            "There is no ability 'animat' to evaluate: did you mean 'animate'?",
        ),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(kind, settings, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        evaluation(kind, **settings)


def test_evaluations_take_what_their_functions_take():
    assert set(TAKES) == set(KINDS)
    sampler = {field.name for field in dataclasses.fields(Settings)}
    for kind, function in (
        ("toyworld", evaluate_toyworld),
        ("abilities", evaluate_abilities),
        ("loss", loss),
    ):
        assert set(TAKES[kind]) <= set(inspect.signature(function).parameters) | sampler
    assert evaluation("abilities", names=tuple(TRIALS)).settings["names"] == tuple(TRIALS)


def test_only_transformers_losses_are_compared():
    with pytest.raises(UserError, match="The loss is compared of transformers alone"):
        resolve(Sweep("toyworld_vae", seeds(1, "seed"), evaluations=[evaluation("loss")]))
    assert len(resolve(Sweep("toyworld_vae", seeds(2, "seed")))) == 2


FILE = """
from sora_jax.sweep.algebra import product, seeds
from sora_jax.sweep.evaluations import evaluation
from sora_jax.sweep.points import Sweep

def get_sweep({argument}):
    return Sweep("toyworld_dit:{base}", seeds(2), {{"steps": 7}}, [evaluation("toyworld", clips=99)])
"""


def test_the_debug_form_is_the_files_own_or_its_bases(tmp_path):
    own, plain = tmp_path / "own.py", tmp_path / "plain.py"
    own.write_text(FILE.format(argument="form='quick'", base='" + form + "'))
    plain.write_text(FILE.format(argument="", base="quick"))
    assert load(str(own)).base == load(str(plain)).base == "toyworld_dit:quick"
    assert load(f"{own}:Pico").base == "toyworld_dit:Pico"
    debug = load(str(own), debug=True)
    assert debug == load(f"{own}:debug") and debug.fixed == {"steps": 7}
    assert (debug.base, len(debug.points)) == ("toyworld_dit:debug", 1)
    assert debug.evaluations[0].settings == {"clips": 1, "steps": 1}
    debug = load(str(plain), debug=True)
    assert (debug.base, len(debug.points), debug.fixed) == ("toyworld_dit:debug", 1, {})
    assert name_of(str(own)) == "own" and name_of(f"{own}:debug") == "own-debug"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "it has no function get_sweep"),
        ("def get_sweep():\n    return 3\n", "get_sweep returns int, not a Sweep"),
        ("def get_sweep():\n    return 1 / 0\n", "gives no sweep: ZeroDivisionError: division by zero"),
        ("def get_sweep(:\n", "gives no sweep: SyntaxError"),
        (FILE.format(argument="", base="quick").replace("seeds(2)", "()"), "The sweep has no points"),
    ],
)
def test_a_file_that_gives_no_sweep_is_one_sentence(tmp_path, text, words):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load(str(tmp_path / "x.py"))


def test_a_sweep_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="There is no sweep resolutoin: did you mean resolution?"):
        load("resolutoin")
    (tmp_path / "x.py").write_text(FILE.format(argument="", base="quick"))
    with pytest.raises(UserError, match="its get_sweep takes no argument: leave out :Pico"):
        load(f"{tmp_path / 'x.py'}:Pico")
