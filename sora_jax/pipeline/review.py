"""Before a job is run: what the model can't do is refused, what it never saw in training is noted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax

from sora_jax.checkpoints.knowledge import Knowledge
from sora_jax.errors import UserError
from sora_jax.media.video import frame_size
from sora_jax.models.wan import WanPair
from sora_jax.pipeline import budget
from sora_jax.pipeline.checks import check_text, short_repr
from sora_jax.pipeline.job import Captions, Job
from sora_jax.pipeline.model import ONLY_PICTURES, VideoModel
from sora_jax.pipeline.settings import Settings

LETTERS_A_TOKEN = 4  # of English text, about
MAX_LETTERS_A_TOKEN = 20
# Where a model's card doesn't say.
USUAL_ASPECTS, MAX_USUAL = ("9:16", "1:1", "16:9"), 4.0
MAX_NAMED = 8  # words in one note


def review_batch(model: VideoModel, jobs: Sequence[Job]) -> list[str]:
    """Notes on jobs that are made together, each once: their own, those of `review`, and whether they take long.

    Raises:
      UserError: as `review`; or they have more frames together than the largest `max_frames` among them.
    """
    batch = [model.cost(*_frames_of(job), job.settings) for job in jobs]
    platform = jax.default_backend()
    if len(jobs) > 1:
        budget.check_batch(batch, max(model.max_frames(job.settings) for job in jobs), platform)
    notes = [note for job in jobs for note in (*job.notes, *review(model, job))]
    if (seconds := budget.seconds(batch, platform)) > budget.LONG:
        what = "A video of" if len(batch) == 1 else "A batch of"
        notes.append(f"{what} {budget.summary(batch)} takes {budget.in_words(seconds)} by a rough estimate.")
    return list(dict.fromkeys(notes))


def review(model: VideoModel, job: Job) -> list[str]:
    """Notes on what the model never saw in training.

    Raises:
      UserError: what the model can't do, and the nearest that it does well; with `Settings.strict` also words that
        it doesn't know, and a prompt that names no thing where there is no other conditioning.
    """
    settings, sketch = job.settings, job.sketch
    T, Y, X, _ = sketch.frames.shape
    _check_picture(model, job)
    if settings.low_noise_guidance is not None and not isinstance(model.dit, WanPair):
        raise UserError(
            f"The model {model.name!r} has one transformer, so there is no low_noise_guidance: leave it out."
        )
    texts = [*job.captions, (0.0, settings.negative)]
    check_captions(model, job.captions)
    check_captions(model, texts[-1:])
    knowledge = model.bundle.knowledge
    warning = _unknown(model.name, texts, knowledge)
    if (
        not warning
        and sketch.all_noise
        and job.captions
        and not any(map(knowledge.names_a_thing, dict(job.captions).values()))
    ):
        warning = f"The prompt names nothing that the model {model.name!r} draws: {_draws(knowledge)}."
    if warning and settings.strict:
        raise UserError(warning)
    if sketch.from_noise and not model.holds((Y, X), T):
        raise UserError(too_large(model, (Y, X)))
    return [*filter(None, [_fixed(model, settings), warning]), *_unseen(model, job, sketch.from_noise)]


def _check_picture(model: VideoModel, job: Job) -> None:
    """Raises UserError where a model that makes videos from a picture is asked for something else."""
    if not model.sampling.from_picture:
        return
    sketch, name = job.sketch, model.name
    given = sketch.conditioning_frames
    first_or_last = bool(given[0]) and not given[1:-1].any() and not given.all()
    if not first_or_last or not (sketch.strength[~given] == 1).all():
        raise UserError(ONLY_PICTURES)
    config, count = model.dit.config, int(given.sum())
    if config.picture_width and count != (wanted := 2 if config.picture_positions else 1):
        what = "two pictures, its first frame and its last" if wanted == 2 else "its first frame alone"
        raise UserError(f"The model {name!r} makes a video from {what}, not from {count}.")
    if job.settings.conditioning_guidance != 1:
        raise UserError(
            f"The model {name!r} never saw a video without its picture: conditioning_guidance is 1."
        )
    T, Y, X, _ = sketch.frames.shape
    most = model.max_latent_frames(model.frame_tokens(Y, X))
    if most and 1 + math.ceil((T - 1) / model.stride) > most:
        raise UserError(
            f"The model {name!r} makes up to {1 + model.stride * (most - 1)} frames of {X}x{Y} from a picture, and {T} "
            "were asked for: choose a shorter duration or a smaller size."
        )


def _fixed(model: VideoModel, settings: Settings) -> str | None:
    """What of the settings a distilled model can't follow."""
    learned = model.sampling.guidance
    asked = settings.guidance not in (1.0, learned) or settings.negative or settings.solver != Settings.solver
    if not (model.sampling.distilled and asked):
        return None
    return (
        f"The model {model.name!r} is distilled: it has learned its steps and a guidance of {learned:g}, so another "
        "guidance, a negative prompt or a solver have no effect."
    )


def check_captions(model: VideoModel, captions: Captions | list[tuple[float, str]]) -> None:
    """Raises UserError where prompts are no text, or longer than the model reads."""
    limits, in_all = model.bundle.limits, 0
    for _, prompt in captions:
        check_text("prompt", prompt)
        if len(prompt) > MAX_LETTERS_A_TOKEN * limits.text:  # which would take long to tokenise
            raise UserError(
                f"The prompt has {len(prompt):,} letters, about {len(prompt) // LETTERS_A_TOKEN:,} tokens, and the "
                f"model {model.name!r} reads {limits.text}: shorten it."
            )
        count = model.text_encoder.count_tokens(prompt)
        in_all += count
        if count > limits.text:
            raise UserError(
                f"The prompt has {count} tokens and the model {model.name!r} reads {limits.text}: shorten it."
            )
    if in_all > limits.text_len:
        raise UserError(
            f"The cards have {in_all} tokens together and the model {model.name!r} reads {limits.text_len}: use "
            "fewer words."
        )


def too_large(model: VideoModel, size: tuple[int, int]) -> str:
    """Why a frame of a size, (height, width), can't be generated, and what can."""
    limits, (height, width) = model.bundle.limits, size
    short, long = min(size), max(size)
    scaled = lambda side: tuple(max(round(own * side / short), 1) for own in size)
    start = (
        f"A frame of {width}×{height} takes {model.frame_tokens(*size):,} tokens, and the model {model.name!r} "
        f"holds {limits.tokens} in a segment of two or more"
    )
    if near := _nearest_learned(model, size):
        return f"{start}: the nearest that it does well is an aspect ratio of {near[0]} at a resolution of {near[1]}."
    if 0 < limits.resolution < short and model.holds(scaled(limits.resolution)):
        return f"{start}: training showed it frames of a resolution of {limits.resolution}, ask for that."
    # No frame holds more pixels than all tokens do.
    area = limits.tokens * math.prod(model.vae.config.compression[1:]) * math.prod(model.dit.config.patch[1:])
    most = min(short - 1, math.isqrt(area * short // long) + 1)
    fitting = next((side for side in range(most, 0, -1) if model.holds(scaled(side))), None)
    if fitting is None:
        return f"{start}: choose an aspect ratio nearer to a square."
    return f"{start}: the nearest that fits is a resolution of {fitting}."


def _nearest_learned(model: VideoModel, size: tuple[int, int]) -> tuple[str, int] | None:
    """The aspect ratio and the resolution where its shape is the fault; None where that is a usual one."""
    knows, (height, width) = model.bundle.knowledge, size
    aspects = knows.aspects or USUAL_ASPECTS
    if _seen(width / height, aspects) if knows.aspects else max(size) <= MAX_USUAL * min(size):
        return None
    aspect = min(aspects, key=lambda each: abs(math.log(_ratio(each) * height / width)))
    whole = model.bundle.limits.resolution
    learned = {side for side in (whole, *knows.resolutions) if 0 < side <= (whole or side)}
    for side in (*sorted(learned, key=lambda each: abs(each - min(size))), *range(min(size), 0, -1)):
        if model.holds(frame_size(side, aspect)):
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
    named = [short_repr(word, 30) for word in words[:MAX_NAMED]]
    if len(words) > MAX_NAMED:
        listed = f"{', '.join(named)} and {len(words) - MAX_NAMED} more words"
    else:
        listed = " and ".join(filter(None, (", ".join(named[:-1]), named[-1])))
    return f"The model {name!r} knows nothing of {listed}: {_draws(knowledge)}."


def _draws(knowledge: Knowledge) -> str:
    return f"it draws {knowledge.domain}, for example {knowledge.example!r}"


def _unseen(model: VideoModel, job: Job, from_noise: bool) -> Iterator[str]:
    """What of a video's shape is beyond training's, in one sentence."""
    knows, sketch = model.bundle.knowledge, job.sketch
    T, Y, X, _ = sketch.frames.shape
    T = len(range(T)[job.keep])
    seconds, fps, short, ratio = T / sketch.fps, sketch.fps, min(Y, X), X / Y
    whole = model.bundle.limits.resolution or max(knows.resolutions, default=0)
    largest = whole if from_noise else max(whole, *knows.resolutions, 0)
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
            f"{' and '.join(beyond)} {verb} beyond what the model {model.name!r} saw in training "
            f"({'; '.join(seen)}): expect a worse picture."
        )


def _frames_of(job: Job) -> tuple[int, tuple[int, int]]:
    T, Y, X, _ = job.sketch.frames.shape
    return T, (Y, X)


def _ratio(aspect: str) -> float:
    across, _, down = str(aspect).partition(":")
    return float(across) / float(down or 1)


def _span(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
