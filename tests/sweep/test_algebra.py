"""Points are made of lists by product, zip and concatenation; what can't be meant is refused with a sentence."""

import pytest

from sora_jax.errors import UserError
from sora_jax.sweep.algebra import arms, concat, param, product, seeds, zipped


def labels(points):
    return [tuple(point.labels.values()) for point in points]


def test_a_product_has_every_pair_and_a_zip_those_of_the_same_place():
    sizes, rates = param("dit.size", ["Pico", "Nano"]), param("optim.lr", [2e-3, 1e-3])
    assert labels(product(sizes, rates)) == [
        ("Pico", "0.002"),
        ("Pico", "0.001"),
        ("Nano", "0.002"),
        ("Nano", "0.001"),
    ]
    assert labels(zipped(sizes, rates)) == [("Pico", "0.002"), ("Nano", "0.001")]
    assert zipped(sizes, rates)[1].overrides == {"dit.size": "Nano", "optim.lr": 1e-3}
    assert labels(product(zipped(sizes, rates), seeds(2)))[-1] == ("Nano", "0.001", "1")


def test_arms_have_names_and_seeds_set_weights_and_order():
    frames = arms("frames", {"square": {"data.crop": "square"}, "native": {}})
    point = product(frames, seeds(3))[2]
    assert point.labels == {"frames": "square", "seed": "2"}
    assert point.overrides == {"data.crop": "square", "seed": 2, "pipeline.seed": 2}
    assert seeds(1, "seed")[0].overrides == {"seed": 0}
    assert param("data.resolutions", [(64,), [32, 64]], "sizes")[1].labels == {"sizes": "32,64"}


def test_one_thing_at_a_time_is_a_concatenation_of_lists_with_one_axis():
    points = concat(arms("change", {"none": {}}), arms("change", {"lr": {"optim.lr": 1e-3}}))
    assert labels(points) == [("none",), ("lr",)]
    with pytest.raises(UserError, match="must have the same axes, and has change and optim.lr"):
        concat(points, param("optim.lr", [1e-3]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: zipped(seeds(2), param("optim.lr", [1e-3])),
            "must be of one length, and is of 2, 1: use product",
        ),
        (
            lambda: product(seeds(2), arms("a", {"x": {"seed": 1}})),
            "two factors of the sweep have the key 'seed'",
        ),
        (lambda: product(param("seed", [1]), arms("seed", {"x": {}})), "have the axis 'seed'"),
        (lambda: param("optim.lr", []), "axis 'optim.lr' has no value"),
        (lambda: param("optim.lr", [1e-3, 0.001]), "has 0.001 twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(UserError, match=f"(?i){words}"):
        make()
