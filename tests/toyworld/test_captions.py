"""Captions: they tell the scene's truth, in varied words; paraphrases are in words that training never saw."""

import re

import numpy as np
import pytest

from sora_jax.toyworld import captions
from sora_jax.toyworld.sampling import sample_scene
from sora_jax.toyworld.scene import COLOURS, SHAPES, SIZES, Scene, Shot, Thing, WorldConfig

DURATION = 2.0


def scenes(count=400, split="train", duration=DURATION, aspect=1.0, **distribution):
    config = WorldConfig(**distribution)
    return [sample_scene(0, index, split, duration, aspect, config) for index in range(count)]


def alone(thing, duration=DURATION):
    return Scene((Shot(0.0, (thing,)),), duration, 1.0)


MOVING = re.compile(
    r"\b(moves?|slides|travels|goes|heads|bounces|falls|drops|stays|stands|grows|gets|shrinks|spins|rotates|turns|camera|"
    r"behind|drifts|glides|floats|wanders|swells|whirls|left|right|up|down)\b"
)


def words_of(split, duration=DURATION, count=500):
    paraphrase = split == "paraphrase"
    for index, scene in enumerate(scenes(count, split, duration)):
        rng = np.random.default_rng(index)
        yield (
            scene,
            captions.short_caption(scene, rng, paraphrase),
            captions.detailed_caption(scene, rng, paraphrase),
            captions.timed_captions(scene, rng, paraphrase),
        )


def names(thing):
    words = captions._TRAINING
    return {f"{c} {s}" for c in words.colours[thing.colour] for s in words.shapes[thing.shape]}


def test_captions_name_everything_there_is():
    for scene, short, detailed, timed in words_of("train"):
        for shot, (start, text) in zip(scene.shots, timed, strict=True):
            assert start == shot.start
            for thing in shot.things:
                for caption in (short, detailed, text):
                    assert any(name in caption for name in names(thing))
            assert shot.background.tone in detailed
            if shot.camera.kind != "still":
                assert "camera" in short and "camera" in detailed and "camera" in text
            if shot.occluder:
                assert "behind a pillar" in short and "behind a pillar" in detailed
        alone = len(scene.shots) == len(scene.shots[0].things) == 1
        if alone and scene.shots[0].things[0].direction:
            said = captions._TRAINING.directions[scene.shots[0].things[0].direction]
            assert any(words in short for words in said) and any(words in detailed for words in said)


def test_captions_are_concise_and_varied():
    shorts, detaileds = zip(*[(short, detailed) for _, short, detailed, _ in words_of("train")], strict=True)
    lengths = np.array([len(text.split()) for text in shorts])
    assert np.mean(lengths <= 25) > 0.96 and lengths.max() <= 33
    lengths = np.array([len(text.split()) for text in detaileds])
    assert np.mean(lengths <= 60) > 0.98 and lengths.max() <= 72
    scene = scenes(1, objects=(1.0, 0, 0), two_shots=0.0)[0]
    assert len({captions.short_caption(scene, np.random.default_rng(i)) for i in range(50)}) > 8
    assert captions.short_caption(scene, np.random.default_rng(1)) == captions.short_caption(
        scene, np.random.default_rng(1)
    )


def test_size_is_in_half_of_short_captions_and_background_in_a_quarter():
    drawn = scenes(400, objects=(1.0, 0.0, 0.0), two_shots=0.0)
    shorts = [captions.short_caption(scene, np.random.default_rng(i)) for i, scene in enumerate(drawn)]
    sized = [bool(re.search(r"small|little|medium|large|big\b", text)) for text in shorts]
    assert np.mean(sized) == pytest.approx(0.5, abs=0.1)
    assert np.mean(["background" in text for text in shorts]) == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("split", ["train", "paraphrase"])
def test_words_for_images_do_not_mention_motion(split):
    for _, short, detailed, timed in words_of(split, duration=0.0, count=200):
        for text in (short, detailed, timed[0][1]):
            assert not MOVING.search(text.lower()), text


def test_paraphrases_use_words_that_training_never_saw():
    def vocabulary(split):
        texts = [text for _, *rest, timed in words_of(split) for text in (*rest, *(t for _, t in timed))]
        return set(re.findall(r"[a-z-]+", " ".join(texts).lower()))

    training, paraphrase = vocabulary("train"), vocabulary("paraphrase")
    attributes = {
        *SHAPES,
        *COLOURS,
        *SIZES,
        "moves",
        "slides",
        "travels",
        "goes",
        "heads",
        "bounces",
        "spins",
        "falls",
    }
    assert attributes <= training
    assert not attributes & paraphrase
    assert not {"crimson", "disc", "drifts", "leftwards", "azure", "glides"} & training
    assert {"crimson", "disc", "drifts", "leftwards", "azure", "glides"} <= paraphrase


def test_what_does_not_land_is_not_said_to_bounce():
    thing = Thing("square", "green", "small", "gravity", start=(-0.3, 0.0), gravity=1.0)
    for i in range(20):
        short = captions.short_caption(alone(thing, 0.3), np.random.default_rng(i))
        assert "bounce" not in short and "floor" not in short
        assert "bounce" in captions.short_caption(alone(thing, 3.0), np.random.default_rng(i))


def test_single_object_prompts():
    rng = np.random.default_rng(0)
    prompts = [captions.single_object_prompt("ring", "orange", None, None, rng) for _ in range(200)]
    assert set(prompts) <= {
        f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in names(Thing("ring", "orange"))
    }
    # The plain word is said half of the time.
    assert 0.35 < np.mean(["orange" in prompt for prompt in prompts]) < 0.65
    text = captions.single_object_prompt("star", "blue", "large", "up-left", rng)
    assert re.fullmatch(r"a (large|big) \w+ \w+ \w+ ((diagonally )?up and (to the )?left|left and up)", text)
    text = captions.single_object_prompt("circle", "red", None, "left", rng, paraphrase=True)
    assert re.match(r"a (crimson|scarlet) (disc|round dot) ", text)


@pytest.mark.parametrize("paraphrase", [False, True])
def test_expanded_prompts_are_as_detailed_captions_are(paraphrase):
    rng = np.random.default_rng(0)
    clip = captions.expanded_prompt("a small red ball goes left", True, rng, paraphrase)
    picture = captions.expanded_prompt("a small red ball", False, rng, paraphrase)
    assert clip.startswith("A small red ball goes left. The ") and clip.count(".") == 3 and "camera" in clip
    assert picture.startswith("A small red ball. The ") and picture.count(".") == 2
    added = set(re.findall(r"[\w-]+", clip.lower())) - {"a", "small", "red", "ball", "goes", "left"}
    assert bool(added & set(captions.vocabulary(paraphrase=True))) == paraphrase
