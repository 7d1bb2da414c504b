"""Captions of Toyworld's scenes: short, detailed and timed, in training's vocabulary or in a held-out one.

Each function draws its wording from `rng`, so one scene has many captions and the same generator state gives the
same one. What a caption states is read from the scene's own formulas of motion: a thing that doesn't reach the
floor within the shot isn't said to bounce.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sora_jax.toyworld import scene as world
from sora_jax.toyworld.scene import Background, Camera, Scene, Shot, Thing

Choices = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Words:
    """Ways to say each thing; the first of a direction's is the briefest. What stands twice comes twice as often."""

    shapes: dict[str, Choices]
    colours: dict[str, Choices]
    sizes: dict[str, Choices]
    directions: Mapping[str, Choices]
    straight: Choices
    bounce: Choices  # followed by a direction
    rebound: Choices  # of a bounce, briefly
    fall: Choices
    fall_and_bounce: Choices
    still: Choices
    grow: Choices
    shrink: Choices
    spin: Choices
    leave: Choices
    behind: Choices
    textures: dict[str, Choices]
    backdrop: Choices
    plain: Choices
    gradient: Choices
    over: Choices
    count: dict[int, Choices]
    camera: dict[str, Choices]
    cut: Choices
    fade: Choices
    image: Choices


def _mostly(words: Iterable[str], others: dict[str, str]) -> dict[str, Choices]:
    """Each word itself half of the time, else one of its others: "ruby vermilion cherry-red"."""
    return {word: (word,) * len(others[word].split()) + tuple(others[word].split()) for word in words}


_TRAINING = _Words(
    shapes=_mostly(
        world.SHAPES,
        {
            "circle": "ball orb sphere",
            "square": "tile cube quadrate",
            "triangle": "pyramid wedge delta",
            "star": "starfish pentagram asterisk",
            "ring": "loop wheel bagel",
        },
    ),
    colours=_mostly(
        world.COLOURS,
        {
            "red": "ruby vermilion cherry-red",
            "orange": "pumpkin amber apricot",
            "yellow": "canary mustard sunflower-yellow",
            "green": "lime mint grass-green",
            "cyan": "teal blue-green lagoon-coloured",
            "blue": "navy sapphire ultramarine",
            "purple": "lavender plum lilac",
            "pink": "fuchsia salmon magenta",
        },
    ),
    sizes={"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")},
    directions={
        "left": ("left", "to the left", "toward the left", "from right to left"),
        "right": ("right", "to the right", "toward the right", "from left to right"),
        "up": ("up", "straight up", "skyward", "toward the sky"),
        "down": ("down", "straight down", "earthward", "toward the earth"),
    }
    | {
        f"{up}-{left}": (
            f"{up} and {left}",
            f"{up} and to the {left}",
            f"diagonally {up} and to the {left}",
            f"{left} and {up}",
        )
        for up in ("up", "down")
        for left in ("left", "right")
    },
    straight=("moves", "slides", "travels", "goes", "heads", "flies", "sails"),
    bounce=("bounces off the edges, starting", "bounces around, first moving"),
    rebound=("bounces off the edges", "bounces around"),
    fall=("falls", "drops down"),
    fall_and_bounce=(
        "falls and bounces on the floor",
        "drops and bounces on the floor",
        "falls down and bounces",
    ),
    still=("stays still", "does not move", "stands still"),
    grow=("grows", "gets bigger", "gets larger"),
    shrink=("shrinks", "gets smaller"),
    spin=("spins", "rotates", "turns in place"),
    leave=("and leaves the frame", "out of the frame"),
    behind=("behind a pillar", "behind a pillar and reappears", "behind a pillar and comes out again"),
    textures={"stripes": ("striped",), "checks": ("checked",), "dots": ("dotted",)},
    backdrop=("background",),
    plain=("plain",),
    gradient=("a gradient of",),
    over=("on", "in front of", "against"),
    count={2: ("two objects", "two shapes"), 3: ("three objects", "three shapes")},
    camera={
        "pan": ("pans", "moves"),
        "in": ("zooms in",),
        "out": ("zooms out",),
        "still": ("is still", "does not move"),
    },
    cut=("then", "then a cut to", "cut to"),
    fade=("fading into", "dissolving into"),
    image=("a picture of", "an image of"),
)
_PARAPHRASE = _Words(
    shapes={
        "circle": ("disc", "round dot"),
        "square": ("box", "block"),
        "triangle": ("three-sided shape", "three-cornered shape"),
        "star": ("five-pointed shape", "starlike figure"),
        "ring": ("hoop", "donut"),
    },
    colours={
        "red": ("crimson", "scarlet"),
        "orange": ("tangerine",),
        "yellow": ("golden", "lemon"),
        "green": ("emerald", "jade"),
        "cyan": ("turquoise", "aqua"),
        "blue": ("azure", "cobalt"),
        "purple": ("violet",),
        "pink": ("rose", "bubblegum"),
    },
    sizes={"small": ("tiny", "petite"), "medium": ("mid-sized", "midsize"), "large": ("huge", "giant")},
    directions={
        "left": ("leftwards", "towards the left side"),
        "right": ("rightwards", "towards the right side"),
        "up": ("upwards", "towards the top"),
        "down": ("downwards", "towards the bottom"),
    }
    | {
        f"{up}-{left}": (f"towards the {upper} {left}", f"towards the {top} {left} corner")
        for up, upper, top in (("up", "upper", "top"), ("down", "lower", "bottom"))
        for left in ("left", "right")
    },
    straight=("drifts", "glides", "floats", "wanders"),
    bounce=("ricochets from the walls, initially", "rebounds from the borders, initially"),
    rebound=("ricochets from the walls", "rebounds from the borders"),
    fall=("plunges", "sinks"),
    fall_and_bounce=("plunges and rebounds from the ground", "sinks to the ground and hops"),
    still=("is motionless", "remains stationary", "rests in its place"),
    grow=("swells", "expands", "becomes wider and taller"),
    shrink=("dwindles", "contracts"),
    spin=("whirls", "twirls", "revolves"),
    leave=("and exits the view", "and vanishes over the border"),
    behind=("behind a column and returns", "past the back of a post and emerges"),
    textures={"stripes": ("banded",), "checks": ("chequered",), "dots": ("speckled",)},
    backdrop=("backdrop",),
    plain=("uniformly", "solid"),
    gradient=("softly shaded", "a fade of"),
    over=("over", "upon"),
    count={2: ("a pair",), 3: ("a trio",)},
    camera={
        "pan": ("sweeps", "swings"),
        "in": ("closes in", "comes nearer"),
        "out": ("pulls back", "retreats"),
        "still": ("is fixed", "remains stationary"),
    },
    cut=("afterwards", "followed by"),
    fade=("blending into", "turning into"),
    image=("a drawing of", "a snapshot of"),
)


def short_caption(scene: Scene, rng: np.random.Generator, paraphrase: bool = False) -> str:
    """What is there and what it does, in about 25 words at most; of an image (no duration) only what is there.

    Unless it is crowded, sizes are named in half of them and backgrounds in a quarter; a moving camera always, for
    without it the motion in the frame would contradict the words.
    """
    writer = _Writer(rng, paraphrase)
    brief = len(scene.shots) > 1
    return _chain(scene, writer, lambda shot: writer.short(shot, scene, brief), ", {} ")


def detailed_caption(scene: Scene, rng: np.random.Generator, paraphrase: bool = False) -> str:
    """Every attribute of the scene in sentences, in about 60 words at most."""
    writer = _Writer(rng, paraphrase)
    return _chain(scene, writer, lambda shot: writer.detailed(shot, scene), " {}: ", capital=True)


def _chain(
    scene: Scene, writer: _Writer, tell: Callable[[Shot], str], joint: str, capital: bool = False
) -> str:
    """The captions of the shots, joined as the shots are."""
    kind = "fade" if any(shot.fade for shot in scene.shots) else "cut"
    word = writer.one(kind)
    return joint.format(word.capitalize() if capital else word).join(tell(shot) for shot in scene.shots)


def timed_captions(
    scene: Scene, rng: np.random.Generator, paraphrase: bool = False
) -> tuple[tuple[float, str], ...]:
    """(start in seconds, short caption) of each shot, in order; one that dissolves from the last says so."""
    writer = _Writer(rng, paraphrase)
    tell = lambda shot: writer.short(shot, scene, brief=False)
    return tuple(
        (shot.start, f"{writer.one('fade')} {tell(shot)}" if shot.fade else tell(shot))
        for shot in scene.shots
    )


def single_object_prompt(
    shape: str,
    colour: str,
    size: str | None,
    direction: str | None,
    rng: np.random.Generator,
    paraphrase: bool = False,
) -> str:
    """The short caption of one object that moves straight; without a direction, of what is there only."""
    writer = _Writer(rng, paraphrase)
    text = writer.noun(Thing(shape, colour, size or "medium"), sized=size is not None)
    return (
        text
        if direction is None
        else f"{text} {writer.one('straight')} {writer.one('directions', direction)}"
    )


def expanded_prompt(prompt: str, moves: bool, rng: np.random.Generator, paraphrase: bool = False) -> str:
    """A short prompt made as detailed as `detailed_caption`'s: what it leaves open is added, as a language model does.

    (Betker et al. 2023, appendix C.) It knows the prompt alone: background and camera are the plainest of training's.

    Args:
      prompt: of `single_object_prompt`.
      moves: whether it is of a clip, not of an image.
    """
    writer = _Writer(rng, paraphrase)
    tones = list(world.TONES)
    background = Background(tone=tones[rng.integers(len(tones))])
    return _sentences([prompt, writer.backdrop(background), *([writer.camera(Camera())] if moves else [])])


def plain_direction(direction: str) -> str:
    """The briefest of training's words for a direction."""
    return _TRAINING.directions[direction][0]


def vocabulary(paraphrase: bool = False) -> tuple[str, ...]:
    """Every word that training's captions may have, or those that only the paraphrase split has; sorted."""
    known = _words_of(_TRAINING) | _words_of((*world.TONES, _LITERALS))
    return tuple(sorted(_words_of(_PARAPHRASE) - known if paraphrase else known))


def things() -> tuple[str, ...]:
    """Every word, of training or paraphrase, that names a thing; sorted."""
    return tuple(sorted(_words_of((_TRAINING.shapes, _PARAPHRASE.shapes))))


def backgrounds() -> tuple[str, ...]:
    """Every word, of training or paraphrase, that stands in the description of a background; sorted."""
    fields = ("textures", "backdrop", "plain", "gradient")
    words = [getattr(half, field) for half in (_TRAINING, _PARAPHRASE) for field in fields]
    return tuple(sorted(_words_of((words, *world.TONES, "is and"))))


def backdrops() -> tuple[str, ...]:
    """The nouns among `backgrounds`."""
    return (*_TRAINING.backdrop, *_PARAPHRASE.backdrop)


def tones() -> tuple[str, ...]:
    """Words that colour backgrounds and no thing; sorted."""
    halves = (
        dataclasses.replace(half, textures={}, backdrop=(), plain=(), gradient=())
        for half in (_TRAINING, _PARAPHRASE)
    )
    return tuple(sorted(_words_of(tuple(world.TONES)) - set().union(*map(_words_of, halves))))


# Words of the sentences themselves, below.
_LITERALS = "a an and the is while camera clockwise counterclockwise"


def _words_of(tree: Any) -> set[str]:
    if isinstance(tree, str):
        return set(re.findall(r"[\w-]+", tree.lower()))
    if dataclasses.is_dataclass(tree):
        tree = [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    parts = tree.values() if isinstance(tree, dict) else tree
    return set().union(*map(_words_of, parts))


class _Writer:
    """Draws words from one vocabulary with one generator."""

    def __init__(self, rng: np.random.Generator, paraphrase: bool):
        self.rng = rng
        self.words = _PARAPHRASE if paraphrase else _TRAINING

    def one(self, field: str, key: str | int | None = None, brief: bool = False) -> str:
        choices = getattr(self.words, field)
        if key is not None:
            choices = choices[key]
        return choices[0 if brief else self.rng.integers(len(choices))]

    def noun(self, thing: Thing, sized: bool) -> str:
        words = [self.one("sizes", thing.size)] if sized else []
        words += [self.one("colours", thing.colour), self.one("shapes", thing.shape)]
        return _with_article(" ".join(words))

    def action(self, thing: Thing, shot: Shot, length: float, aspect: float, brief: bool) -> str:
        """What the thing does during the shot; `brief` has the fewest words that keep it true."""
        if thing.motion == "straight":
            text = f"{self.one('straight')} {self.one('directions', thing.direction, brief)}"
            if shot.occluder is not None:
                return f"{text} {self.one('behind')}"
            left = shot.camera.kind == "still" and _is_out(thing, length, aspect)
            return f"{text} {self.one('leave')}" if left else text
        if thing.motion == "bounce":
            if brief:
                return self.one("rebound")
            return f"{self.one('bounce')} {self.one('directions', thing.direction)}"
        if thing.motion == "gravity":
            floor = world.room(thing, aspect)[0][1]
            lands = math.sqrt(2 * max(floor - thing.start[0], 0) / thing.gravity) < length
            return self.one("fall_and_bounce" if lands else "fall")
        return self.one(thing.motion)

    def ground(self, background: Background) -> str:
        texture = f"{self.one('textures', background.texture)} " if background.texture else ""
        return f"{texture}{background.tone} {self.one('backdrop')}"

    def camera(self, camera: Camera) -> str:
        if camera.kind == "pan":
            return f"the camera {self.one('camera', 'pan')} {self.one('directions', camera.direction, brief=True)}"
        return f"the camera {self.one('camera', camera.direction or 'still')}"

    def short(self, shot: Shot, scene: Scene, brief: bool) -> str:
        """One clause a thing; `brief` leaves out what the things of a crowd do."""
        length, many = _length(shot, scene), len(shot.things)
        sized = bool(self.rng.random() < 0.5) and many < 3
        acts = length > 0 and not (brief and many > 1)
        clauses = []
        for thing in shot.things:
            does = f" {self.action(thing, shot, length, scene.aspect, brief=many > 1)}" if acts else ""
            clauses.append(self.noun(thing, sized) + does)
        text = _join(clauses)
        if many > 1 and self.rng.random() < 0.2:
            text = f"{self.one('count', many)}: {text}"
        elif length == 0 and self.rng.random() < 0.2:
            text = f"{self.one('image')} {text}"
        if self.rng.random() < 0.25 and not brief and many < 3:
            text += f" {self.one('over')} {_with_article(self.ground(shot.background))}"
        if length > 0 and shot.camera.kind != "still":
            text += f" while {self.camera(shot.camera)}"
        return text

    def detailed(self, shot: Shot, scene: Scene) -> str:
        length, crowded = _length(shot, scene), len(shot.things) + len(scene.shots) > 3
        clauses = []
        for thing in shot.things:
            does = f" {self.action(thing, shot, length, scene.aspect, brief=crowded)}" if length > 0 else ""
            if does and thing.motion == "spin" and not crowded:
                does += " clockwise" if thing.spin > 0 else " counterclockwise"
            clauses.append(self.noun(thing, sized=True) + does)
        sentences = [_join(clauses), self.backdrop(shot.background)]
        if length > 0 and (shot.camera.kind != "still" or len(scene.shots) == 1):
            sentences.append(self.camera(shot.camera))
        return _sentences(sentences)

    def backdrop(self, background: Background) -> str:
        return f"the {self.one('backdrop')} is {self.pattern(background)}"

    def pattern(self, background: Background) -> str:
        if background.kind == "textured":
            return f"{background.tone} and {self.one('textures', background.texture)}"
        return f"{self.one(background.kind)} {background.tone}"


def _length(shot: Shot, scene: Scene) -> float:
    later = [other.start for other in scene.shots if other.start > shot.start]
    return min([*later, scene.duration]) - shot.start


def _is_out(thing: Thing, length: float, aspect: float) -> bool:
    """Whether the thing has gone from the frame when the shot ends."""
    reach = world.EXTENTS[thing.shape][3] * thing.radius
    beyond = np.abs(world.position(thing, length, aspect)) - world.half_frame(aspect)
    return bool((beyond > reach).any())


def _sentences(clauses: list[str]) -> str:
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _join(clauses: list[str]) -> str:
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
