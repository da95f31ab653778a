"""The moving world's prompts: six tasks like GenEval's, with rows that say exactly what a clip must show.

A row is ``{"task": ..., "objects": [...], "prompt": ...}``; an object has the keys shape, color, count and motion, and
speed where the prompt names one.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flowalign.toyworld.grammar import COLORS, split
from flowalign.toyworld.render import SHAPES
from flowalign.toyworld.tasks import NUMBERS, Metadata, plural, with_article
from rewards.errors import RewardError, nearest

FRAMES, FPS = 9, 8
TASKS = ("direction", "speed", "stays", "bounce", "two_objects", "counting")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WALLS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
STAY, BOUNCE = "stay", "bounce "  # the second stands before a wall
MOTIONS = {**DIRECTIONS, STAY: (0, 0), **{BOUNCE + wall: way for wall, way in WALLS.items()}}  # where they first lead
SPEEDS = {"slowly": (1.0, 1.25, 1.5, 1.75), "quickly": (2.75, 3.0, 3.25)}  # pixels a frame that are drawn
TURNING = 3  # least number of steps to the wall of a bounce, and back from it
_UNSEEN = 8  # one combination of colour, shape and motion in so many is kept out of training


@dataclass(frozen=True)
class Demand:
    """What a prompt says about one object."""

    shape: str
    color: str
    motion: str
    speed: str | None = None

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


def demands(metadata: Mapping[str, Any]) -> list[Demand]:
    """One demand for each object of a row. Raises RewardError for a row that is none of this world's."""
    if not metadata.get("objects"):
        raise RewardError("moving world: the row has no key 'objects'; use a prompt list of the moving world")
    known = {"shape": SHAPES, "color": COLORS, "motion": MOTIONS, "speed": SPEEDS}
    for clause, (key, names) in itertools.product(metadata["objects"], known.items()):
        if (value := clause.get(key)) not in names and not (key == "speed" and value is None):
            near = nearest(str(value), names)
            raise RewardError(f"moving world: an object's {key} is {value!r}; the nearest that it can be is {near!r}")
    for clause in metadata["objects"]:
        if clause.get("count") not in (1, *NUMBERS):
            raise RewardError(f"moving world: an object's count is {clause.get('count')!r}, not 1 to {max(NUMBERS)}")
    return [
        Demand(clause["shape"], clause["color"], clause["motion"], clause.get("speed"))
        for clause in metadata["objects"]
        for _ in range(clause["count"])
    ]


def task_prompts(task: str) -> list[Metadata]:
    """All prompts of one of the TASKS, as metadata rows with the key `prompt`, in a fixed order."""
    one = {"color": COLORS, "shape": SHAPES}
    axes: dict[str, dict[str, Any]] = {
        "direction": {**one, "motion": DIRECTIONS},
        "speed": {**one, "motion": DIRECTIONS, "speed": SPEEDS},
        "stays": {**one, "motion": [STAY]},
        "bounce": {**one, "motion": [BOUNCE + wall for wall in WALLS]},
        "counting": {**one, "motion": DIRECTIONS, "count": NUMBERS},
    }
    if task == "two_objects":
        pairs = (itertools.permutations(choices, 2) for choices in (COLORS, SHAPES, [*DIRECTIONS, STAY]))
        return [
            _row(task, *(_clause(*picked) for picked in zip(*pair, strict=True))) for pair in itertools.product(*pairs)
        ]
    if task not in axes:
        raise ValueError(f"unknown task {task!r} of the moving world; the tasks are {', '.join(TASKS)}")
    names, choices = axes[task].keys(), axes[task].values()
    return [_row(task, _clause(**dict(zip(names, chosen, strict=True)))) for chosen in itertools.product(*choices)]


def _clause(color: str, shape: str, motion: str, count: int = 1, speed: str | None = None) -> Metadata:
    clause = {"shape": shape, "color": color, "count": count, "motion": motion}
    return clause if speed is None else {**clause, "speed": speed}


def _row(task: str, *clauses: Metadata) -> Metadata:
    return {"task": task, "objects": list(clauses), "prompt": " and ".join(_says(clause) for clause in clauses)}


def _says(clause: Metadata) -> str:
    """As in "a red circle moves left quickly" or "three green squares move up"."""
    name, count, motion = f"{clause['color']} {clause['shape']}", clause["count"], clause["motion"]
    subject, s = (with_article(name), "s") if count == 1 else (f"{NUMBERS[count]} {plural(name)}", "")
    if motion == STAY:
        return f"{subject} stay{s} in place"
    if motion.startswith(BOUNCE):
        return f"{subject} bounce{s} off the {motion.removeprefix(BOUNCE)} wall"
    return " ".join([subject, f"move{s}", motion, *([clause["speed"]] if "speed" in clause else [])])


def is_unseen(clause: Mapping[str, Any]) -> bool:
    """Whether an object's colour, shape and motion are one of the combinations that are kept out of training.

    Each pair of two of them is in some training prompt.
    """
    places = COLORS.index(clause["color"]), SHAPES.index(clause["shape"]), list(MOTIONS).index(clause["motion"])
    return (places[0] + 3 * places[1] + 5 * places[2]) % _UNSEEN == 0


def training_prompts(task: str) -> list[Metadata]:
    """The rows of a task without any unseen combination: the only ones that a model of this world may be trained on."""
    return [row for row in task_prompts(task) if not any(map(is_unseen, row["objects"]))]


def prompt_lists() -> Iterator[tuple[str, list[Metadata]]]:
    """The bundled lists: train, test (of other prompts) and unseen (only of unseen combinations)."""
    seen = [training_prompts(task) for task in TASKS]
    unseen = [[row for row in task_prompts(task) if all(map(is_unseen, row["objects"]))] for task in TASKS]
    yield "train", split(seen, per_task=200, held_out=False)
    yield "test", split(seen, per_task=40, held_out=True)
    yield "unseen", split(unseen, per_task=40, held_out=None)
