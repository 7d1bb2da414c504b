"""Every picture of docs/abilities.md, from prompts and seeds: `make gallery`.

    python experiments/gallery/run.py [--model toyworld] [--only animate,extend]

What is given is drawn by toyworld or made by the model itself; so the pictures need nothing but the package.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import click

import sora_jax
from sora_jax.media.contact_sheet import contact_sheet
from sora_jax.media.video import Video, resize
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.storyboard import Card, Storyboard
from sora_jax.toyworld.render import render
from sora_jax.toyworld.scene import Background, Camera, Scene, Shot, Thing

ROOT = pathlib.Path(__file__).parents[2]
FPS = 8.0
Picture = list[tuple[str, Video]]
PICTURES: dict[str, Callable[[Pipeline], Picture]] = {}


def picture(function: Callable[[Pipeline], Picture]) -> Callable[[Pipeline], Picture]:
    PICTURES[function.__name__] = function
    return function


def clip(
    shape: str,
    colour: str,
    start: tuple[float, float],
    velocity: tuple[float, float],
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float = FPS,
    tone: tuple[int, int, int] = (198, 198, 200),
    extent: str = "large",
) -> Video:
    """A thing that moves straight on a plain background."""
    thing = Thing(shape, colour, extent, "straight", None, start, velocity)
    shot = Shot(0.0, (thing,), Background(colours=(tone, tone)), Camera())
    return Video(render(Scene((shot,), 3.0, size[1] / size[0]), frames, *size, fps), fps)


RIGHT = lambda colour="red", shape="circle", frames=17: clip(shape, colour, (0.0, -0.25), (0.0, 0.25), frames)


@picture
def image(pipeline: Pipeline) -> Picture:
    prompts = [
        ("a red circle", "1:1"),
        ("a large blue square", "16:9"),
        ("a yellow star", "9:16"),
        ("a green ring", "1:1"),
    ]
    return [(prompt, pipeline.image(prompt, aspect=aspect, seed=1)) for prompt, aspect in prompts]


@picture
def animate(pipeline: Pipeline) -> Picture:
    first = RIGHT().frames[0]
    out = [("given", Video(first[None], FPS))]
    for direction in ("right", "up", "down and right"):
        prompt = f"a red circle moves {direction}"
        out.append((prompt, pipeline.animate(first, prompt, seed=2)))
    return out


@picture
def extend(pipeline: Pipeline) -> Picture:
    known = clip("square", "blue", (0.0, -0.1), (0.0, 0.1), 9)
    return [
        ("given", known),
        (
            "forward, three times as long again",
            pipeline.extend(known, 3.4, "a blue square bounces off the edges", seed=1),
        ),
        ("backward", pipeline.extend(known, 1.0, "a blue square moves right", backward=True, seed=1)),
    ]


@picture
def loop(pipeline: Pipeline) -> Picture:
    known = RIGHT("green", "circle", 9)
    return [
        ("given", known),
        ("its loop", pipeline.loop(known, "a green circle moves left", seed=3)),
        ("of a prompt", pipeline.loop(None, "a large pink circle moves up", duration=2.625, seed=3)),
    ]


@picture
def fill(pipeline: Pipeline) -> Picture:
    known = clip("triangle", "cyan", (0.1, -0.3), (-0.1, 0.3))
    hidden = known.frames.copy()
    hidden[5:12] = 0
    return [
        ("given: frames 5 to 11 are missing", Video(hidden, FPS)),
        ("filled", pipeline.fill_frames(known, [(5 / FPS, 12 / FPS)], "a cyan triangle moves right", seed=1)),
        ("the truth", known),
    ]


@picture
def smooth(pipeline: Pipeline) -> Picture:
    known = clip("circle", "orange", (0.0, -0.3), (0.0, 0.6), 9)
    made = pipeline.smooth(known, 24.0, "an orange circle moves right", seed=1)
    truth = clip("circle", "orange", (0.0, -0.3), (0.0, 0.6), 25, fps=24.0)
    part = slice(0, 7)
    return [
        ("made: frames 0, 3 and 6 are given", Video(made.frames[part], 24.0)),
        ("the truth", Video(truth.frames[part], 24.0)),
    ]


@picture
def slow(pipeline: Pipeline) -> Picture:
    known = clip("star", "yellow", (0.0, -0.2), (0.0, 0.4), 9)
    made = pipeline.slow(known, 2, "a yellow star moves right", seed=1)
    return [
        ("given: frames 0 to 2", Video(known.frames[:3], FPS)),
        ("made: frames 0, 2 and 4 are those", Video(made.frames[:5], FPS)),
    ]


@picture
def connect(pipeline: Pipeline) -> Picture:
    a, b = RIGHT("red", "circle", 9), clip("square", "blue", (0.1, 0.2), (0.0, -0.25), 9, tone=(70, 74, 84))
    return [("A", a), ("B", b), ("A, the passage, B", pipeline.connect(a, b, seed=1))]


@picture
def blend(pipeline: Pipeline) -> Picture:
    a, b = RIGHT("red", "circle"), clip("square", "blue", (0.0, -0.25), (0.0, 0.25))
    return [("A", a), ("B", b), ("weight from 0 to 1", pipeline.blend(a, b, seed=1))]


@picture
def inpaint(pipeline: Pipeline) -> Picture:
    known = RIGHT("red", "circle")
    made = pipeline.inpaint(known, "a green square stays still", box=(20, 16, 24, 32), seed=1)
    return [("given", known), ("the box 20,16,24,32 generated again: a green square stays still", made)]


@picture
def outpaint(pipeline: Pipeline) -> Picture:
    known = RIGHT("purple", "circle")
    return [
        ("given", known),
        ("to 16:9", pipeline.outpaint(known, "16:9", "a purple circle moves right", seed=1)),
    ]


@picture
def edit(pipeline: Pipeline) -> Picture:
    known = clip("circle", "purple", (0.0, -0.25), (0.0, 0.25), extent="medium")
    prompt = "an orange circle moves right"
    out = [("given", known)]
    for strength in (0.3, 0.5, 0.7, 0.9):
        out.append((f"{prompt}, strength {strength}", pipeline.edit(known, prompt, strength, seed=1)))
    out.append(("the same, 0.5 with --motion", pipeline.edit(known, prompt, 0.5, motion=True, seed=1)))
    # One that fails: most of the clips whose colour stays are large red things that should turn blue.
    out.append(("given, large", RIGHT("red", "circle")))
    failing = "a blue circle moves right"
    out.append((f"{failing}, strength 0.7", pipeline.edit(out[-1][1], failing, 0.7, seed=1)))
    return out


@picture
def storyboard(pipeline: Pipeline) -> Picture:
    cards = (Card(0.0, "a red circle moves right"), Card(1.5, "a large blue square moves left"))
    board = Storyboard(cards, duration=3.125)
    return [(" / ".join(card.text for card in cards), pipeline.storyboard(board, seed=1))]


@picture
def recut(pipeline: Pipeline) -> Picture:
    known = clip("star", "yellow", (-0.1, -0.25), (0.1, 0.25), 17)
    made = pipeline.recut(known, 0.5, 1.0, 1.0, "a yellow star moves up", seed=1)
    return [("given", known), ("0.5 to 1 s, and a second more: a yellow star moves up", made)]


@picture
def upscale(pipeline: Pipeline) -> Picture:
    truth = clip("star", "pink", (-0.1, -0.2), (0.1, 0.3), 9, (128, 128))
    small = resize(truth, 64, 64)
    return [
        ("64 pixels, scaled up by a filter (Lanczos)", resize(small, 128, 128)),
        ("upscaled", pipeline.upscale(small, 128, "a pink star moves right", seed=1)),
        ("the truth", truth),
    ]


@picture
def variations(pipeline: Pipeline) -> Picture:
    made = pipeline.variations("a large red ring moves up", 4, seed=1)
    return [(f"seed {i}", video) for i, video in enumerate(made, 1)]


@click.command()
@click.option("--model", default="toyworld")
@click.option("--only", default="", help="Some pictures: animate,extend.")
@click.option("--out", default=str(ROOT / "docs" / "abilities"))
def main(model: str, only: str, out: str) -> None:
    """Draws the pictures."""
    pipeline = sora_jax.load(model)
    names = only.split(",") if only else list(PICTURES)
    for name in names:
        labels, videos = zip(*PICTURES[name](pipeline), strict=True)
        path = pathlib.Path(out) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(videos, labels, 2 if len(videos) > 2 else 1).save(path)
        click.echo(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    main()
