"""Before a plan is made: what the model can't do is refused, what it never saw in training is noted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax

from sora_jax.checkpoints.knowledge import Knowledge
from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.pipeline import budget
from sora_jax.pipeline.checks import check_text, shown
from sora_jax.pipeline.codec import Engine
from sora_jax.pipeline.denoise import Words
from sora_jax.pipeline.planning import Plan

LETTERS_A_TOKEN = 4  # of English text, about
MOST_LETTERS_A_TOKEN = 20
USUAL_ASPECTS, MOST_USUAL = (
    ("9:16", "1:1", "16:9"),
    4.0,
)  # where a model doesn't tell; beyond that it is a strip
MOST_NAMED = 8  # words in one note


def review_batch(engine: Engine, plans: Sequence[Plan]) -> list[str]:
    """Notes on plans that are made together, each once: their own, those of `review`, and whether they take long.

    Raises:
      UserError: as `review`; or they have more frames together than the largest `max_frames` among them.
    """
    batch = [engine.work(*_frames_of(plan), plan.settings) for plan in plans]
    platform = jax.default_backend()
    if len(plans) > 1:
        budget.check_batch(batch, max(engine.most_frames(plan.settings) for plan in plans), platform)
    notes = [note for plan in plans for note in (*plan.notes, *review(engine, plan))]
    if (seconds := budget.seconds(batch, platform)) > budget.LONG:
        what = "A video of" if len(batch) == 1 else "A batch of"
        notes.append(f"{what} {budget.summary(batch)} takes {budget.in_words(seconds)} by a rough estimate.")
    return list(dict.fromkeys(notes))


def review(engine: Engine, plan: Plan) -> list[str]:
    """Notes on what the model never saw in training.

    Raises:
      UserError: what the model can't do, and the nearest that it does well; with `Settings.strict` also words that
        it doesn't know, and a prompt that names no thing where nothing else is given.
    """
    settings, sketch = plan.settings, plan.sketch
    T, Y, X, _ = sketch.frames.shape
    settings.check()
    texts = [*plan.words, (0.0, settings.negative)]
    check_words(engine, plan.words)
    check_words(engine, texts[-1:])
    knowledge = engine.bundle.knowledge
    doubt = _unknown(engine.name, texts, knowledge)
    if (
        not doubt
        and sketch.blank
        and plan.words
        and not any(map(knowledge.names_a_thing, dict(plan.words).values()))
    ):
        doubt = f"The prompt names nothing that the model {engine.name!r} draws: {_draws(knowledge)}."
    if doubt and settings.strict:
        raise UserError(doubt)
    blank = bool(sketch.strength.max() == 1)
    if blank and not engine.holds((Y, X), T):
        raise UserError(too_large(engine, (Y, X)))
    engine.admit(T, (Y, X), sketch.fps, settings, held=not sketch.blank)
    return [*filter(None, [doubt]), *_unseen(engine, plan, blank)]


def check_words(engine: Engine, words: Words | list[tuple[float, str]]) -> None:
    """Raises UserError where prompts are no text, or longer than the model reads."""
    limits, in_all = engine.bundle.limits, 0
    for _, prompt in words:
        check_text("prompt", prompt)
        if len(prompt) > MOST_LETTERS_A_TOKEN * limits.text:  # which would take long to tokenise
            raise UserError(
                f"The prompt has {len(prompt):,} letters, about {len(prompt) // LETTERS_A_TOKEN:,} tokens, and the "
                f"model {engine.name!r} reads {limits.text}: shorten it."
            )
        count = engine.text.count_tokens(prompt)
        in_all += count
        if count > limits.text:
            raise UserError(
                f"The prompt has {count} tokens and the model {engine.name!r} reads {limits.text}: shorten it."
            )
    if in_all > limits.text_len:
        raise UserError(
            f"The cards have {in_all} tokens together and the model {engine.name!r} reads {limits.text_len}: use "
            "fewer words."
        )


def too_large(engine: Engine, size: tuple[int, int]) -> str:
    """Why a frame of a size, (height, width), can't be painted from nothing, and what can."""
    limits, (height, width) = engine.bundle.limits, size
    short, long = min(size), max(size)
    scaled = lambda side: tuple(max(round(own * side / short), 1) for own in size)
    start = (
        f"A frame of {width}×{height} takes {engine.frame_tokens(*size):,} tokens, and the model {engine.name!r} "
        f"holds {limits.tokens} in a run of two or more"
    )
    if near := _nearest_learned(engine, size):
        return f"{start}: the nearest that it does well is an aspect ratio of {near[0]} at a resolution of {near[1]}."
    if 0 < limits.resolution < short and engine.holds(scaled(limits.resolution)):
        return f"{start}: training showed it frames of a resolution of {limits.resolution}, ask for that."
    # No frame holds more pixels than all tokens do.
    area = (
        limits.tokens * math.prod(engine.vae.config.compression[1:]) * math.prod(engine.dit.config.patch[1:])
    )
    most = min(short - 1, math.isqrt(area * short // long) + 1)
    fitting = next((side for side in range(most, 0, -1) if engine.holds(scaled(side))), None)
    if fitting is None:
        return f"{start}: choose an aspect ratio nearer to a square."
    return f"{start}: the nearest that fits is a resolution of {fitting}."


def _nearest_learned(engine: Engine, size: tuple[int, int]) -> tuple[str, int] | None:
    """The aspect ratio and the resolution for a strip, whose shape is the fault; None where that is a usual one."""
    knows, (height, width) = engine.bundle.knowledge, size
    aspects = knows.aspects or USUAL_ASPECTS
    if _seen(width / height, aspects) if knows.aspects else max(size) <= MOST_USUAL * min(size):
        return None
    aspect = min(aspects, key=lambda each: abs(math.log(_ratio(each) * height / width)))
    whole = engine.bundle.limits.resolution
    learned = {side for side in (whole, *knows.resolutions) if 0 < side <= (whole or side)}
    for side in (*sorted(learned, key=lambda each: abs(each - min(size))), *range(min(size), 0, -1)):
        if engine.holds(frame_size(side, aspect)):
            return str(aspect), side
    return None


def _seen(ratio: float, aspects: Sequence[str]) -> bool:
    ratios = [_ratio(aspect) for aspect in aspects]
    return 0.93 * min(ratios) <= ratio <= 1.07 * max(ratios)


def _unknown(name: str, texts: list[tuple[float, str]], knowledge: Knowledge) -> str:
    """A sentence that names the words that the model doesn't know; empty where there are none."""
    words = list(dict.fromkeys(word for _, text in texts for word in knowledge.unknown_words(text)))
    if not words:
        return ""
    named = [shown(word, 30) for word in words[:MOST_NAMED]]
    if len(words) > MOST_NAMED:
        listed = f"{', '.join(named)} and {len(words) - MOST_NAMED} more words"
    else:
        listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    return f"The model {name!r} knows nothing of {listed}: {_draws(knowledge)}."


def _draws(knowledge: Knowledge) -> str:
    return f"it draws {knowledge.domain}, for example {knowledge.example!r}"


def _unseen(engine: Engine, plan: Plan, blank: bool) -> Iterator[str]:
    """What of a video's shape lies beyond training's, in one sentence."""
    knows, sketch = engine.bundle.knowledge, plan.sketch
    T, Y, X, _ = sketch.frames.shape
    T = len(range(T)[plan.keep])
    seconds, fps, short, ratio = T / sketch.fps, sketch.fps, min(Y, X), X / Y
    whole = engine.bundle.limits.resolution or max(knows.resolutions, default=0)
    largest = whole if blank else max(whole, *knows.resolutions, 0)
    beyond, seen = [], []
    if knows.resolutions and not min(knows.resolutions) <= short <= largest:
        beyond.append(f"{short} pixels")
        seen.append(f"{_span(min(knows.resolutions), largest)} pixels on the short side")
    if knows.aspects and not _seen(ratio, knows.aspects):
        beyond.append(f"{X}×{Y}")
        seen.append(f"aspect ratios {', '.join(knows.aspects)}")
    if T > 1 and knows.rates and not min(knows.rates) <= fps <= max(knows.rates):
        beyond.append(f"{fps:g} fps")
        seen.append(f"{_span(min(knows.rates), max(knows.rates))} fps")
    # A frame's end, not its beginning, is counted here and there.
    if knows.durations and seconds > max(knows.durations) + 1.5 / fps:
        beyond.append(f"{seconds:g} s")
        seen.append(f"up to {max(knows.durations):g} s")
    if beyond:
        verb = "is" if len(beyond) == 1 else "are"
        yield (
            f"{' and '.join(beyond)} {verb} beyond what the model {engine.name!r} saw in training "
            f"({'; '.join(seen)}): expect a worse picture."
        )


def _frames_of(plan: Plan) -> tuple[int, tuple[int, int]]:
    T, Y, X, _ = plan.sketch.frames.shape
    return T, (Y, X)


def _ratio(aspect: str) -> float:
    across, _, down = str(aspect).partition(":")
    return float(across) / float(down or 1)


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
