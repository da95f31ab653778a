"""GenEval's six tasks as a grammar: prompts with their metadata, for any objects and colours.

Source: Ghosh et al., "GenEval: An object-focused framework for evaluating text-to-image alignment" (2023).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from rewards.geneval import RELATIONS, TASKS

NUMBERS = {2: "two", 3: "three", 4: "four"}
NEVER_COLORED = "person"

Metadata = dict[str, Any]


def grammar(
    task: str, names: Sequence[str], colors: Sequence[str]
) -> tuple[tuple[Sequence[Any], ...], Callable[..., Metadata]]:
    """The free choices of a task, one list for each, and the function that builds a row from one choice of each.

    `names` are the objects, `colors` their possible colours. Raises ValueError for a task that is not in TASKS.
    """
    pairs = list(itertools.permutations(names, 2))
    colored = [name for name in names if name != NEVER_COLORED]

    def row(include: list[Metadata], text: str, **more: Any) -> Metadata:
        return {"tag": task, "include": include, **more, "prompt": f"a photo of {text}"}

    def single(name: str) -> Metadata:
        return row([_clause(name)], with_article(name))

    def two(pair: tuple[str, str]) -> Metadata:
        return row([_clause(name) for name in pair], " and ".join(with_article(name) for name in pair))

    def counting(name: str, number: int) -> Metadata:
        return row([_clause(name, number)], f"{NUMBERS[number]} {plural(name)}", exclude=[_clause(name, number + 1)])

    def color(name: str, paint: str) -> Metadata:
        return row([_clause(name, color=paint)], with_article(f"{paint} {name}"))

    def position(pair: tuple[str, str], relation: str) -> Metadata:
        name, target = pair
        return row(
            [_clause(target), _clause(name, position=[relation, 0])],
            f"{with_article(name)} {relation} {with_article(target)}",
        )

    def attributes(pair: tuple[str, str], paints: tuple[str, str]) -> Metadata:
        painted = list(zip(pair, paints, strict=True))
        include = [_clause(name, color=paint) for name, paint in painted]
        return row(include, " and ".join(with_article(f"{paint} {name}") for name, paint in painted))

    painted_pairs = list(itertools.permutations(colored, 2)), list(itertools.permutations(colors, 2))
    grammars: dict[str, tuple[tuple[Sequence[Any], ...], Callable[..., Metadata]]] = {
        "single_object": ((names,), single),
        "two_object": ((pairs,), two),
        "counting": ((names, list(NUMBERS)), counting),
        "colors": ((colored, colors), color),
        "position": ((pairs, RELATIONS), position),
        "color_attr": (painted_pairs, attributes),
    }
    if task not in grammars:
        raise ValueError(f"unknown GenEval task {task!r}; the tasks are {', '.join(TASKS)}")
    return grammars[task]


def _clause(name: str, count: int = 1, **more: Any) -> Metadata:
    return {"class": name, "count": count, **more}


def with_article(noun: str) -> str:
    """The noun behind "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(name: str) -> str:
    """The plural by the benchmark's own rule, which models are tested with: "wine glasses", but also "benchs"."""
    return name + ("es" if name.endswith("s") else "s")
