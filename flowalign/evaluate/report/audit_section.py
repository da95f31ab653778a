"""The report's section on reward hacking: the results of the audits, and the images to look at."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowalign.config.base import counted
from flowalign.disk.media import image_names
from flowalign.evaluate.report import plots
from flowalign.evaluate.report.html import embedded, parsed

Row = dict[str, Any]
SHOWN = 4  # prompts whose images are shown
_SIDE = 192  # pixels


def hacking_section(evaluations: Sequence[Row], folder: Path) -> Row | None:
    """The values that the template shows of a run's audits; None if no evaluation was audited."""
    audited = [evaluation for evaluation in evaluations if "audit" in evaluation]
    if not audited:
        return None
    audits = []
    for evaluation in audited:
        found = evaluation["audit"]
        plain = {"verdict": "; ".join(found["alarms"]) or "no alarm", "excused": []}  # for runs of older versions
        audits.append({"step": evaluation["step"], "distance": math.sqrt(found["kl"]), **plain, **found})
    last, alarmed = audits[-1], [audit for audit in audits if audit["alarms"]]
    return {
        "answer": _answer(audits),
        "audits": audits,
        "last": last,
        "alarmed": alarmed,
        "measures": [(name, found, found.get("high")) for name, found in last["measures"].items()],
        "plot": plots.hacking_plot(audits),
        "images": _images(audited, audits, folder),
    }


def _answer(audits: Sequence[Row]) -> str:
    """How many audits alarmed, the first alarm's step and reason, and the measures that were excused."""
    alarmed = [audit for audit in audits if audit["alarms"]]
    of = counted(len(audits), "audit")
    if alarmed:
        text = f"{len(alarmed)} of {of} alarmed, first at step {alarmed[0]['step']}: {'; '.join(alarmed[0]['alarms'])}"
    else:
        text = f"None of {of} alarmed"
    names = list(dict.fromkeys(name for audit in audits for name in audit["excused"]))
    if names:
        count = sum(bool(audit["excused"]) for audit in audits)
        why = "outside the bands, excused because the held-out rewards rose"
        return f"{text}; in {count} of them {', '.join(names)} {'was' if len(names) == 1 else 'were'} {why}"
    return text if alarmed else f"{text}: every measure stayed in the base model's band"


def _images(audited: Sequence[Row], audits: Sequence[Row], folder: Path) -> list[Row]:
    """Images before training, at the first alarm, and at the step with the lowest held-out rewards.

    Without held-out rewards the last audited step is shown instead. Among the prompts whose images are kept, those
    whose held-out rewards fell most are shown.
    """
    steps = {0: "before training"} if audits[0]["step"] == 0 else {}
    first = next((audit["step"] for audit in audits if audit["alarms"]), None)
    if first is not None:
        steps[first] = f"step {first}, the first alarm"
    later = [audit for audit in audits if audit["step"] > 0]
    if not later:
        return []
    judged = [audit for audit in later if audit["panel"] is not None]
    worst = min(judged, key=lambda audit: audit["panel"])["step"] if judged else later[-1]["step"]
    kind = "held-out rewards lowest" if judged else "the last audit"
    steps[worst] = f"{steps[worst]}; {kind}" if worst in steps else f"step {worst}, {kind}"
    prompts = parsed(folder / "samples" / f"step_{worst:06d}" / "prompts.json", json.loads) or []
    falls = _falls(audited[0], next(one for one in audited if one["step"] == worst), prompts)
    names = image_names(len(prompts))
    order = sorted(range(len(prompts)), key=lambda place: falls[place])[:SHOWN]
    return [
        {
            "prompt": prompts[place],
            "images": [
                (title, embedded(path, _SIDE))
                for step, title in sorted(steps.items())
                if (path := folder / "samples" / f"step_{step:06d}" / names[place]).is_file()
            ],
        }
        for place in order
    ]


def _falls(before: Row, after: Row, prompts: Sequence[str]) -> list[float]:
    """The change of each prompt's held-out rewards, in units of their spread over seeds; the lowest fell most."""
    spreads = {
        name: found["spread"] for name, found in after["audit"]["measures"].items() if found["kind"] == "quality"
    }
    changes = []
    for prompt in prompts:
        pairs = zip(before["rows"], after["rows"], strict=True)
        first, last = next((a["scores"], b["scores"]) for a, b in pairs if a["prompt"] == prompt)
        known = [name for name in spreads if name in first and name in last]
        changes.append(float(np.sum([(last[name] - first[name]) / max(spreads[name], 1e-9) for name in known])))
    return changes
