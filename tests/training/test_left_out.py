"""Samples that a reward leaves out: they are in no statistic, teach nothing, and are counted."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rewards
from flowalign.advantages import RewardTable
from flowalign.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from flowalign.algorithms.gdro import GDRO, GDROSettings
from flowalign.cli.app import main
from flowalign.cli.scoring import collect_recipe
from flowalign.config import recipe_from_dict
from flowalign.config.base import UserError
from flowalign.experiments.scaling import check_judges
from flowalign.rollout.stages import Recorded
from flowalign.score import tally, unread
from flowalign.trainer import Trainer
from flowalign.training.display import Display
from rewards import Reward, RewardError
from rewards.combine import score_all, uncertainty_weighted, weighted_sum, worst_case

PICKY = """
import torch
from rewards import Reward
class Picky(Reward):
    masks = True
    def __init__(self, every=3):
        self.every, self.seen = every, 0
    def __call__(self, media, prompts, metadata):
        scores = media.flatten(1).mean(1)
        scores[[place for place in range(len(media)) if (self.seen + place) % self.every == 0]] = float("nan")
        self.seen += len(media)
        return scores
    def tally(self):
        counts, self.seen = {"answers": self.seen, "unparsable": -(-self.seen // self.every)}, 0
        return counts
"""
ODE = {"steps": 2, "batch": 8}
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
TOTAL = torch.tensor([1.0, math.nan, 3.0, 5.0, 6.0, 9.0, math.nan, math.nan, math.nan])


class Dark(Reward):
    """Brightness; it leaves out images that are darker than a fifth."""

    masks = True

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        level = media.flatten(1).mean(1)
        return torch.where(level < 0.2, math.nan, level)


class Even(Reward):
    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        return torch.full((len(media),), 0.5)


def greys(*levels: float) -> torch.Tensor:
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def scored(total: torch.Tensor) -> RewardTable:
    known = ~total.isnan()
    return RewardTable(total, total[None], known[None], torch.ones(1), ("judge",), measured=total[None])


def test_a_total_is_unknown_if_a_weighted_reward_left_the_sample_out() -> None:
    scores = score_all({"dark": Dark(), "even": Even()}, greys(0.1, 0.4), ["a", "b"])
    assert scores["dark"].applies.tolist() == [False, True] and scores["even"].applies.all()
    both = {"dark": 1.0, "even": 1.0}
    for total in (weighted_sum(scores, both), worst_case(scores, both), uncertainty_weighted(scores, both, 0.0)):
        assert total[0].isnan() and not total[1].isnan()  # 0.5 would be a number of another kind
    assert weighted_sum(scores, {"dark": 0.0, "even": 1.0}).tolist() == [0.5, 0.5]
    with pytest.raises(RewardError, match="as nan, which is not a finite number"):
        rewards.score(rewards.as_reward(lambda *_: [math.nan], "plain"), greys(0.1), ["a"])


def test_samples_left_out_are_in_no_statistic_and_teach_nothing() -> None:
    algorithm, known = FlowGRPO(FlowGRPOSettings(advantage_std="group")), ~TOTAL.isnan()
    learnt = algorithm.lessons(scored(TOTAL), GROUPS)
    assert torch.equal(learnt.teaches, known)
    alone = algorithm.lessons(scored(TOTAL[known]), GROUPS[known])
    assert torch.equal(learnt.advantages[known], alone.advantages)
    assert torch.equal(learnt.advantages[~known], torch.zeros(4))
    torch.testing.assert_close(learnt.advantages[[0, 2]], torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)


def test_an_algorithm_of_whole_groups_skips_a_group_that_lacks_a_sample() -> None:
    learnt = GDRO(GDROSettings()).lessons(scored(TOTAL), GROUPS)
    assert learnt.teaches.tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert torch.isfinite(learnt.advantages).all()


def test_a_step_without_any_score_teaches_nothing() -> None:
    learnt = FlowGRPO(FlowGRPOSettings()).lessons(scored(torch.full((9,), math.nan)), GROUPS)
    assert not learnt.teaches.any() and not learnt.differs.any() and not learnt.advantages.any()


@pytest.fixture
def picky(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "picky.py").write_text(PICKY)
    (tmp_path / "prompts.txt").write_text("a photo of two stars\na photo of a red ring\n")
    judge = {"picky": {"load": f"{tmp_path / 'picky.py'}:Picky"}}
    train = {**values["train"], "micro_batch": 4}
    return {**values, "rewards": judge, "prompts": str(tmp_path / "prompts.txt"), "train": train}


@pytest.mark.parametrize("algorithm", ["flow_grpo", "gdro"])
def test_a_run_trains_without_the_samples_left_out_and_counts_them(
    picky: dict[str, Any], algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = picky["rollout"] if algorithm == "flow_grpo" else ODE
    Trainer.from_recipe(
        recipe_from_dict({**picky, "algorithm": algorithm, "rollout": rollout}), display=Display()
    ).run()
    folder = Path(picky["run"]["folder"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["answers"]["picky"]["unparsable"] == -(-line["answers"]["picky"]["answers"] // 3) > 0
        assert math.isfinite(line["grad_norm"]) and 0 < line["reward"]["total"] == line["reward"]["picky"]
    assert "step 1: picky could not read" in capsys.readouterr().out
    assert any(line["grad_norm"] > 0 for line in lines) == (algorithm == "flow_grpo")  # every group lacks a sample


def test_a_dataset_records_which_samples_were_left_out(picky: dict[str, Any], tmp_path: Path) -> None:
    picky = {**picky, "dataset": str(tmp_path / "store"), "algorithm": "gdro", "rollout": ODE}
    picky["rewards"]["picky"]["options"] = {"every": 5}
    recipe = recipe_from_dict(picky)
    dataset = collect_recipe(recipe, "cpu")
    left_out = torch.from_numpy(dataset.rewards["picky"]).isnan()
    assert 0 < left_out.sum() < left_out.numel()
    trainer = Trainer.from_recipe(recipe, display=Display(quiet=True))
    samples = trainer.source.next(trainer.policy, 0)
    assert isinstance(samples, Recorded)
    scores = samples.scores["picky"]
    assert torch.equal(scores.values.isnan(), ~scores.applies) and not scores.applies.all()
    weighted = trainer._weighted(trainer._scored(samples))
    assert torch.equal(weighted.teaches.view(-1, 4)[:, 0], scores.applies.view(-1, 4).all(1))


def test_best_of_n_refuses_a_judge_that_leaves_images_out() -> None:
    with pytest.raises(UserError, match="reward 'dark' may leave images without a score"):
        check_judges({"dark": Dark()})


def test_rewards_with_unread_answers_are_named(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    judges = {"picky": rewards.load(f"{tmp_path / 'picky.py'}:Picky")}
    score_all(judges, greys(0.1, 0.2, 0.3, 0.4), ["a"] * 4)
    assert unread(tally(judges)) == ["picky could not read 2 of 4 answers"]
    assert unread(tally(judges)) == []


def test_score_shows_and_writes_the_images_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "drawn").mkdir()
    for name, level in (("1.png", 51), ("2.png", 102)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / "drawn" / name)
    where = ["--images", str(tmp_path / "drawn"), "--prompts", str(tmp_path / "prompts.txt")]
    output = tmp_path / "scores.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["score", f"{tmp_path / 'picky.py'}:Picky", *where, "--output", str(output)])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "left out" in printed and "mean 0.4000 of 1 images" in printed and "could not read 1 of 2" in printed
    assert [json.loads(line)["score"] for line in output.read_text().splitlines()] == [None, pytest.approx(0.4)]
