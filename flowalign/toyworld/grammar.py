"""The embedded world's prompts, in GenEval's six tasks and metadata format, and scenes that fulfil them."""

import itertools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from flowalign.toyworld.render import LINE_LENGTH, PALETTE, SHAPES, SIZE, Item, Scene
from flowalign.toyworld.tasks import Metadata, grammar
from rewards.geneval import TASKS, relations

COLORS = tuple(PALETTE)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GAP = 3  # pixels between the boxes of two shapes
MARGIN = 2  # pixels between a shape and the frame


def task_prompts(task: str) -> list[Metadata]:
    """All prompts of one of GenEval's tasks, as metadata rows with the key `prompt`, in a fixed order."""
    axes, make = grammar(task, SHAPES, COLORS)
    return [make(*choice) for choice in itertools.product(*axes)]


def split_shapes(per_task: int, held_out: bool, seed: int = 0) -> list[Metadata]:
    """A list with `per_task` rows of each task; no prompt of the held-out list is in the other list."""
    return split([task_prompts(task) for task in TASKS], per_task, held_out, seed)


def split(tasks: Sequence[Sequence[Metadata]], per_task: int, held_out: bool | None, seed: int = 0) -> list[Metadata]:
    """`per_task` of each task's rows, shuffled: of the quarter that is held out, of the others or, for None, of all.

    A task with fewer prompts than rows repeats them; rows with the same prompt still get different noise.
    """
    rows: list[Metadata] = []
    for index, prompts in enumerate(tasks):
        order = np.random.default_rng([seed, index]).permutation(len(prompts))
        cut = max(2, len(prompts) // 4)
        chosen = {True: order[:cut], False: order[cut:], None: order}[held_out]
        rows += [prompts[i] for i in itertools.islice(itertools.cycle(chosen), per_task)]
    shuffled = np.random.default_rng([seed, len(tasks)]).permutation(len(rows))
    return [rows[i] for i in shuffled]


def words(held_out: bool) -> list[str]:
    """The sign words of 3 to 5 capital letters; no training prompt has a held-out word.

    Every fifth word of the alphabetical list and all of a second list are held out. Random letters may still spell one.
    """
    first, second = (_word_file(name) for name in ("words.txt", "words_held_out.txt"))
    chosen = [word for index, word in enumerate(first) if (index % 5 == 2) == held_out]
    return chosen + second if held_out else chosen


def _word_file(name: str) -> list[str]:
    text = resources.files("flowalign.toyworld").joinpath(name).read_text(encoding="utf-8")
    return sorted({word.upper() for word in text.split()})


def sign_prompt(lines: Sequence[str]) -> str:
    """The prompt of a sign with these lines."""
    return f'a sign that says "{" ".join(lines)}"'


def split_signs(count: int, held_out: bool, seed: int = 0) -> list[str]:
    """`count` different sign prompts of one word, held out or not."""
    pool = words(held_out)
    order = np.random.default_rng([seed, int(held_out)]).permutation(len(pool))
    return [sign_prompt([pool[i]]) for i in order[:count]]


def random_background(rng: np.random.Generator) -> dict[str, Any]:
    """A light tinted gradient and its angle, as a scene's fields."""
    base = rng.uniform(226, 250, size=3)
    second = (base + rng.uniform(-12, 12, size=3)).clip(220, 255)
    return {"background": (tuple(base), tuple(second)), "angle": float(rng.uniform(0, 2 * np.pi))}


def apart(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether at least _GAP pixels lie between two boxes (x0, y0, x1, y1), horizontally or vertically."""
    return max(a[0], b[0]) - min(a[2], b[2]) >= _GAP or max(a[1], b[1]) - min(a[3], b[3]) >= _GAP


def shape_scene(metadata: Metadata, rng: np.random.Generator) -> Scene:
    """A random scene that fulfils a prompt of `task_prompts`."""
    wanted = [(clause, color) for clause in metadata["include"] for color in [clause.get("color")] * clause["count"]]
    largest = 30 if len(wanted) <= 2 else 22
    while True:
        items: list[Item] = []
        for clause, color in wanted:
            size = int(rng.integers(14, largest + 1))
            x, y = (int(v) for v in rng.integers(MARGIN, SIZE - MARGIN - size + 1, size=2))
            item = Item(clause["class"], color or str(rng.choice(COLORS)), x, y, size)
            if not all(apart(item.box, other.box) for other in items):
                break
            if "position" in clause:
                relation, target = clause["position"]
                if relation not in relations(item.box, items[target].box):
                    break
            items.append(item)
        if len(items) == len(wanted):
            return Scene(items=tuple(items), **random_background(rng))


def sign_scene(lines: Sequence[str], rng: np.random.Generator) -> Scene:
    """A random sign with these lines, each of at most 5 capital letters."""
    red, green, blue = (int(v) for v in rng.uniform(0, 75, size=3))
    slack = (SIZE - 12 * max(len(line) for line in lines)) // 2
    dx = int(rng.integers(-min(slack, 3), min(slack, 3) + 1))
    dy = int(rng.integers(-4, 5))
    return Scene(lines=tuple(lines), ink=(red, green, blue), offset=(dx, dy), **random_background(rng))


def random_lines(rng: np.random.Generator, pool: Sequence[str]) -> list[str]:
    """One or two lines of a sign; each is a word of the pool or, equally often, 2 to 5 random letters."""
    lines = []
    for _ in range(int(rng.integers(1, 3))):
        if rng.random() < 0.5:
            lines.append(str(rng.choice(list(pool))))
        else:
            lines.append("".join(rng.choice(list(LETTERS), size=int(rng.integers(2, LINE_LENGTH + 1)))))
    return lines


def random_example(rng: np.random.Generator, pool: Sequence[str], shapes: float) -> tuple[str, Scene]:
    """A prompt and a scene that fulfils it: with probability `shapes` one of the six tasks, else a sign."""
    if rng.random() >= shapes:
        lines = random_lines(rng, pool)
        return sign_prompt(lines), sign_scene(lines, rng)
    task = TASKS[int(rng.choice(len(TASKS), p=_TASK_MIX))]
    prompts = _PROMPTS[task]
    metadata = prompts[int(rng.integers(len(prompts)))]
    return metadata["prompt"], shape_scene(metadata, rng)


_PROMPTS = {task: task_prompts(task) for task in TASKS}
_TASK_MIX = (0.08, 0.14, 0.2, 0.12, 0.22, 0.24)  # probabilities of TASKS: the harder tasks are drawn more often
