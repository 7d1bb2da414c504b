"""The registry of abilities: what each takes and what its command says.

A new ability is one entry here with its function in `temporal_abilities` or `spatial_abilities`, one test, and one
section of docs/abilities.md. The command line, the methods of `Pipeline` and the tests read this table. It imports
nothing, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Kind = Literal[
    "text", "file", "video", "seconds", "time", "factor", "share", "place", "spans", "curve", "box", "flag"
]


@dataclasses.dataclass(frozen=True)
class Param:
    """A keyword of an ability's function, and an argument or option of its command.

    Attributes:
      name: the keyword.
      kind: of value; of a "video" a part may be taken (--start and --end).
      help: of the option.
      default: what the command passes without the option; None leaves it to the function.
      required: whether it must be named.
      argument: whether it is an argument of the command, not an option.
      option: the option's name where it isn't the keyword.
    """

    name: str
    kind: Kind = "text"
    help: str = ""
    default: Any = None
    required: bool = False
    argument: bool = False
    option: str = ""


@dataclasses.dataclass(frozen=True)
class Ability:
    """An ability: its function, its command and what they take.

    Attributes:
      name: of the command, of the function that builds its job (`pipeline.BUILDERS`), and of its evaluation in
        `evaluation.abilities.TRIALS`, where it has one.
      help: of the command, in a sentence.
      params: besides those of `shape.Shape` and `settings.Settings`, which all abilities have.
      shape: what --help says of the result's shape by default, where that isn't the input's own.
      leave_out: fields of the shape that it doesn't have.
      method: of `Pipeline`, where it isn't called like the command.
      output: the file that is written by default, where it isn't a video.
    """

    name: str
    help: str
    params: tuple[Param, ...]
    shape: dict[str, str] = dataclasses.field(default_factory=dict)
    leave_out: tuple[str, ...] = ()
    method: str = ""
    output: str = ""


# The shape of text to video; `request.Request` has the same defaults.
TEXT_TO_VIDEO = {"duration": "2", "fps": "8", "resolution": "64", "aspect": "1:1"}

_PROMPT = Param("prompt", help="What the video shows; none: what the input suggests.", default="")
_WORDS = Param("prompt", required=True, argument=True)
_OPTIONAL_WORDS = Param("prompt", default="", argument=True)
_VIDEO = Param("video", "video", required=True, argument=True)
_A, _B = (Param(name, "video", required=True, argument=True) for name in ("a", "b"))
_LONGER = Param("seconds", "seconds", "How much longer it becomes; or name its --duration.")
_OF_A = dict.fromkeys(("fps", "resolution", "aspect"), "A's own")

_ABILITIES = (
    Ability(
        "image",
        "A picture of PROMPT.",
        (_WORDS,),
        shape=TEXT_TO_VIDEO,
        leave_out=("duration", "frames", "fps"),
        output="out.png",
    ),
    Ability(
        "animate",
        "A video that begins with PICTURE, or shows it at the time --at.",
        (
            Param("picture", "file", required=True, argument=True),
            _OPTIONAL_WORDS,
            Param("at", "place", "Where PICTURE is: first, last or seconds.  [default: first]"),
        ),
        shape={"duration": "2", "fps": "8"},
    ),
    Ability(
        "extend",
        "VIDEO continued, forward or backward in time.",
        (
            _VIDEO,
            _LONGER,
            Param("backward", "flag", "Generate what came before, not what comes after."),
            _PROMPT,
        ),
        shape={"duration": "of VIDEO and --seconds"},
    ),
    Ability(
        "recut",
        "VIDEO from --start to --end, and a new continuation.",
        (
            Param("video", "file", required=True, argument=True),
            Param("start", "time", "Seconds into VIDEO where it begins.", required=True),
            Param("end", "seconds", "Seconds into VIDEO where it ends.", required=True),
            _LONGER,
            _PROMPT,
        ),
        shape={"duration": "of the part and --seconds"},
    ),
    Ability(
        "loop",
        "An endless loop of VIDEO, or of --prompt alone.",
        (
            Param("video", "video", argument=True),
            _PROMPT,
            Param("seconds", "seconds", "How long it takes back to the beginning.  [default: 1.5]"),
        ),
        shape={"duration": "of VIDEO and --seconds; without VIDEO 3"}
        | {name: f"VIDEO's own, else {TEXT_TO_VIDEO[name]}" for name in ("fps", "resolution", "aspect")},
    ),
    Ability(
        "fill",
        "VIDEO with missing frames generated.",
        (
            _VIDEO,
            Param(
                "missing",
                "spans",
                "What is missing, in seconds from --start on: 0.5-1,1.5-2.",
                required=True,
                option="at",
            ),
            _PROMPT,
        ),
        method="fill_frames",
    ),
    Ability("smooth", "VIDEO at a higher frame rate.", (_VIDEO, _PROMPT), shape={"fps": "24"}),
    Ability(
        "slow",
        "VIDEO in slow motion.",
        (_VIDEO, Param("factor", "factor", "How many times as long it becomes.", default=2), _PROMPT),
        shape={"duration": "--factor times VIDEO's own"},
    ),
    Ability(
        "connect",
        "Clip A turns into clip B.",
        (
            _A,
            _B,
            Param("seconds", "seconds", "How long the transition takes.  [default: 2]"),
            Param("strength", "share", "1: free; less: nearer to a cross-fade.", default=1.0),
            _PROMPT,
        ),
        shape={"duration": "of A, B and --seconds"} | _OF_A,
    ),
    Ability(
        "blend",
        "Clips A and B at once, by a weight over time.",
        (
            _A,
            _B,
            Param("curve", "curve", "seconds:weight of B, such as 0:0,1:0.5,2:1."),
            Param("strength", "share", "How far mixed frames are changed.", default=0.7),
            _PROMPT,
        ),
        shape={"duration": "of the shorter one"} | _OF_A,
    ),
    Ability(
        "inpaint",
        "VIDEO with a part of the picture generated again.",
        (
            _VIDEO,
            _OPTIONAL_WORDS,
            Param("box", "box", "left,top,width,height in VIDEO's pixels."),
            Param("mask", "file", "A picture or video, light where it is generated again."),
        ),
    ),
    Ability(
        "outpaint",
        "VIDEO in a larger frame of another aspect ratio.",
        (_VIDEO, _PROMPT),
        shape={"aspect": "must be named, or --size"},
    ),
    Ability(
        "edit",
        "Edit VIDEO to match PROMPT (SDEdit).",
        (
            _VIDEO,
            _WORDS,
            Param("strength", "share", "0 keeps everything, 1 nothing.", default=0.7),
            Param("motion", "flag", "Keep motion, not colours."),
        ),
    ),
    Ability(
        "storyboard",
        "The video that FILE describes in cards (YAML; see docs/abilities.md).",
        (Param("board", "file", required=True, argument=True, option="file"),),
        shape=dict.fromkeys(TEXT_TO_VIDEO, "what FILE says"),
    ),
    Ability(
        "upscale",
        "VIDEO at a higher resolution.",
        (_VIDEO, Param("strength", "share", "How far details are changed.", default=0.3), _PROMPT),
        shape={"resolution": "must be named, or --size"},
    ),
)
ABILITIES = {ability.name: ability for ability in _ABILITIES}
