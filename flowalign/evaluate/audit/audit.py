"""The audit of an evaluation: does a reward rise because the images became better, or at their expense?

Held-out rewards are not trained on. They must fall neither below the base model nor below their own best of the run.
This holds for each of them and for the panel, the mean of all held-out rewards, each in units of its spread over seeds.
Image statistics, the diversity within a prompt and the size of the velocities must stay where the base model could be,
unless the panel has risen: better images differ from the base model's too. See `bands` for the bounds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from flowalign.config import Guard
from flowalign.config.base import UserError
from flowalign.evaluate.audit.bands import Band, Kind, learn_bands
from flowalign.evaluate.audit.divergence import Divergence
from flowalign.evaluate.audit.image_statistics import STATISTICS, group_diversity, image_statistics
from flowalign.evaluate.evaluation import Evaluated, Seen
from rewards.backbones.features import unit_features
from rewards.base import grouped

CORRECTED, PANEL, DIVERSITY, VELOCITY = "corrected", "panel", "diversity", "velocity_ratio"
_SIDE = 16  # pixels; the side of the shrunk images that are compared if no feature model is set

T = TypeVar("T")
Values = Mapping[str, np.ndarray]


class Measured(NamedTuple):
    """The measures of one evaluation."""

    values: dict[str, np.ndarray]  # (n,) of each measure, nan for a prompt to which it does not apply
    proxy: np.ndarray  # (N,), the weighted mean of the training rewards of each image


@dataclass
class Audit:
    """An evaluation's measures compared with the bands of the base model."""

    values: dict[str, float]
    bands: dict[str, Band]
    proxy: float
    """The weighted mean of the training rewards, without shaping."""
    kl: float
    """KL to the base model in nats per image; see `divergence`."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """The highest value of each held-out reward in earlier evaluations of the run."""
    alarms: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.alarms = [self._sentence(name) for name in self.where("alarm")]

    @property
    def panel(self) -> float | None:
        """How far the held-out rewards have risen, in units of their spread over seeds; None if there are none."""
        return self.values[PANEL] - self.bands[PANEL].center if PANEL in self.bands else None

    def state(self, name: str) -> str:
        """The state of a measure: inside, drift, alarm, or excused.

        A measure that is not a quality is excused if it is outside its band but the panel has risen.
        """
        band = self.bands[name]
        found = "alarm" if self._fallen(name) else band.state(self.values[name])
        risen = self.panel is not None and self.panel > self.bands[PANEL].drift
        return "excused" if found == "alarm" and band.kind != "quality" and risen else found

    def _fallen(self, name: str) -> bool:
        return self.values[name] < self.peaks.get(name, -math.inf) - self.bands[name].fall

    def _sentence(self, name: str) -> str:
        value, band = self.values[name], self.bands[name]
        if band.low <= value <= band.high:
            return f"{name} {value:.4g} has fallen from {self.peaks[name]:.4g}, by more than {band.fall:.4g}"
        bound, side = (band.low, "below") if value < band.low else (band.high, "above")
        return f"{name} {value:.4g} is {side} {bound:.4g} (base model {band.center:.4g})"

    def where(self, state: str) -> list[str]:
        """The measures in a state."""
        return [name for name in self.bands if self.state(name) == state]

    @property
    def remark(self) -> str:
        """A sentence on all that does not alarm, in the words of the table; may be empty if something alarms."""
        excused, calm = self.where("excused"), "" if self.alarms else "no alarm; "
        if not excused:
            return calm and f"{calm}all measures are inside the base model's bands"
        theirs = "its band" if len(excused) == 1 else "their bands"
        why = "excused because the held-out rewards rose"
        return f"{calm}{len(excused)} outside {theirs}, {why}: {', '.join(excused)}"

    @property
    def verdict(self) -> str:
        """The alarms and the remark, in one line."""
        return "; ".join([*self.alarms, *([self.remark] if self.remark else [])])

    def contents(self) -> dict[str, Any]:
        """The audit as JSON values."""
        measures = {}
        for name, band in self.bands.items():
            bounds = {key: value for key, value in asdict(band).items() if value != math.inf}
            measures[name] = {"value": self.values[name], "state": self.state(name), **bounds}
        about = {"proxy": self.proxy, "panel": self.panel, "kl": self.kl}
        found = {"verdict": self.verdict, "alarms": self.alarms, "excused": self.where("excused")}
        return {**about, VELOCITY: self.values[VELOCITY], **found, "measures": measures}


class Auditor:
    """Computes the measures that a guard's settings ask for, and the bands and audits from them."""

    def __init__(
        self, settings: Guard, weights: Mapping[str, float], images_per_prompt: int, device: torch.device | str
    ):
        """weights: of the training rewards, by their names in evaluations."""
        self.settings = settings
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.kinds: dict[str, Kind] = dict.fromkeys(settings.rewards or {}, "quality")
        if settings.corrected:
            self.kinds[CORRECTED] = "quality"
        if self.kinds:
            self.kinds = {PANEL: "quality", **self.kinds}
        self.kinds |= dict.fromkeys(STATISTICS, "statistic")
        if images_per_prompt > 1:
            self.kinds[DIVERSITY] = "statistic"
        self.kinds[VELOCITY] = "statistic"
        self.compares = images_per_prompt > 1
        self.features: Callable[[torch.Tensor], torch.Tensor] = _shrunk
        if settings.features and self.compares:
            self.features = unit_features(
                settings.features.model, settings.features.backbone, 64, device, "guard.features"
            )

    def observe(self, media: torch.Tensor) -> list[Seen]:
        """Image statistics and features of each of B images (B, 3, H, W) or videos, whose frames are averaged."""
        seen = image_statistics(media)
        features = torch.empty(len(media), 0)
        if self.compares:
            of_frames = self.features(media.float().flatten(0, -4))
            features = of_frames.view(len(media), -1, of_frames.shape[1]).mean(1).cpu()
        return [
            Seen({name: float(values[row]) for name, values in seen.items()}, features[row].numpy())
            for row in range(len(media))
        ]

    def measured(self, evaluated: Evaluated) -> Measured:
        """The values of each measure on `guard.count` prompts, except the panel and the velocity ratio.

        Raises UserError for a measure that applies to none of these prompts.
        """
        groups = grouped((row.index, place) for place, row in enumerate(evaluated.rows))
        chosen = spaced(list(groups.values()), self.settings.count)
        scores = [self._with_corrected(one) for one in evaluated.scores]
        columns: dict[str, list[float]] = {name: [] for name in self.kinds if name not in (PANEL, VELOCITY)}
        for places in chosen:
            for name, column in columns.items():
                if name == DIVERSITY:
                    features = np.stack([evaluated.seen[place].features for place in places])
                    column.append(group_diversity(torch.from_numpy(features)))
                elif name in STATISTICS:
                    column.append(float(np.mean([evaluated.seen[place].statistics[name] for place in places])))
                else:
                    known = [scores[place][name] for place in places if name in scores[place]]
                    column.append(float(np.mean(known)) if known else math.nan)
        values = {name: np.array(column) for name, column in columns.items()}
        for name, found in values.items():
            if np.isnan(found).all():
                raise UserError(f"guard: {name} applies to none of the {len(chosen)} audited prompts")
        return Measured(values, np.array([self._proxy(one) for one in evaluated.scores]))

    def _with_corrected(self, scores: Mapping[str, float]) -> dict[str, float]:
        """The scores of an image, with GDRO's corrected score if both of its parts are known."""
        asked = self.settings.corrected
        if asked is None or asked.reward not in scores or asked.quality not in scores:
            return dict(scores)
        quality = 1 + 4 * (scores[asked.quality] - asked.low) / (asked.high - asked.low)
        return {**scores, CORRECTED: corrected_score(scores[asked.reward], quality)}

    def _proxy(self, scores: Mapping[str, float]) -> float:
        known = {name: weight for name, weight in self.weights.items() if name in scores}
        total = sum(known.values())
        return sum(weight * scores[name] for name, weight in known.items()) / total if total else math.nan

    def bands(self, sets: Sequence[Values], divergences: Sequence[Divergence]) -> dict[str, Band]:
        """The bands of the base model, from its evaluations and its paths with several seeds."""
        norms = np.stack([found.norm.numpy() for found in divergences])
        ratios = norms / norms.mean(0)  # the velocities of one seed relative to the mean over all seeds
        everything = [{**values, VELOCITY: ratio} for values, ratio in zip(sets, ratios, strict=True)]
        kinds = {name: kind for name, kind in self.kinds.items() if name != PANEL}
        rate = self.settings.false_alarm / len(self.kinds)
        found = learn_bands(everything, kinds, rate)
        if PANEL not in self.kinds:
            return found
        panels = [{PANEL: panel(values, found)} for values in sets]
        return {**learn_bands(panels, {PANEL: "quality"}, rate), **found}

    def audit(
        self, measured: Measured, divergence: Divergence, bands: Mapping[str, Band], peaks: Mapping[str, float]
    ) -> Audit:
        """The audit of one evaluation; peaks: the highest value of each held-out reward in earlier evaluations."""
        values = {name: float(np.nanmean(found)) for name, found in measured.values.items()}
        if PANEL in bands:
            values[PANEL] = float(np.nanmean(panel(measured.values, bands)))
        values[VELOCITY] = divergence.velocity_ratio.mean().item()
        proxy, kl = float(np.nanmean(measured.proxy)), divergence.kl.mean().item()
        return Audit(values, dict(bands), proxy, kl, dict(peaks))


def panel(values: Values, bands: Mapping[str, Band]) -> np.ndarray:
    """(n,): the mean of each prompt's held-out rewards, each in units of its spread over seeds; nan without one."""
    units = [
        values[name] / max(band.spread, 1e-9)
        for name, band in bands.items()
        if band.kind == "quality" and name != PANEL
    ]
    known = ~np.isnan(units)
    total, count = np.where(known, units, 0.0).sum(0), known.sum(0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, so that every part of a joined list is represented."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def corrected_score(reward: float, quality: float) -> float:
    """GDRO's corrected score of a reward r in [0, 1]: r (u - 3) + 0.2, with the image's quality u from 1 to 5."""
    return reward * (quality - 3) + 0.2


def _shrunk(images: torch.Tensor) -> torch.Tensor:
    """Features (B, 768) whose distances are root mean squares of pixel differences."""
    small = F.adaptive_avg_pool2d(images, _SIDE).flatten(1)
    return small / math.sqrt(small.shape[1])
