"""`rewards.check` finds each breach of the contract, and none in a reward that keeps it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

import rewards
from rewards import Golden, Reward, RewardError, TrainableReward


class Brightness(Reward):
    """The mean level: keeps the contract; tests break it one way at a time."""

    range = (0.0, 1.0)

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        return media.flatten(1).mean(1)

    def golden(self) -> Golden:
        return Golden(torch.full((1, 3, 4, 4), 0.25), ["any"], [{}], [0.25])


def broken(change: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], **declared: Any) -> Reward:
    class Broken(Brightness):
        def __call__(
            self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
        ) -> torch.Tensor:
            return change(media, prompts)

    for name, value in declared.items():
        setattr(Broken, name, value)
    return Broken()


def failed(reward: Reward) -> list[str]:
    return [finding.check for finding in rewards.check(reward) if finding.passed is False]


def means(media: torch.Tensor) -> torch.Tensor:
    return media.flatten(1).mean(1)


def test_a_reward_that_keeps_the_contract_passes_every_check() -> None:
    findings = rewards.check(Brightness())
    assert [finding for finding in findings if not finding.passed] == []
    assert len(findings) == 9


@pytest.mark.parametrize(
    ("check", "change", "declared"),
    [
        ("another order, the same scores", lambda m, p: means(m) + torch.arange(len(m)) * 0.01, {}),
        ("each item alone, the same scores", lambda m, p: means(m) - means(m).mean(), {"range": (-1.0, 1.0)}),
        ("within its declared range", lambda m, p: 3 * means(m), {}),
        ("deterministic", lambda m, p: means(m) + 0.01 * torch.rand(()), {}),
        ("media are left as they were", lambda m, p: m.mul_(0.5).flatten(1).mean(1), {}),
        ("the prompt does not matter", lambda m, p: means(m) * torch.tensor([len(t) / 99 for t in p]), {}),
        ("the prompt matters", lambda m, p: means(m), {"prompt_sensitive": True}),
        ("golden scores", lambda m, p: means(m) ** 2, {}),
        ("a video of equal frames scores as its frame", lambda m, p: means(m) / (m.ndim - 3), {}),
    ],
)
def test_each_breach_is_found(
    check: str, change: Callable[[torch.Tensor, Sequence[str]], torch.Tensor], declared: dict[str, Any]
) -> None:
    assert check in failed(broken(change, **declared))


def test_a_reward_that_writes_into_its_metadata_is_found() -> None:
    class Writer(Brightness):
        def __call__(self, media: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
            metadata[0]["seen"] = True
            return means(media)

    assert failed(Writer()) == ["media are left as they were"]


def test_a_reward_for_groups_is_tried_by_groups() -> None:
    def centred(media: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        own = means(media)
        groups = [[own[i] for i, other in enumerate(prompts) if other == prompt] for prompt in prompts]
        return own - torch.stack([torch.stack(group).mean() for group in groups])

    assert failed(broken(centred, scope="group", range=(-1.0, 1.0), golden=lambda self: None)) == []
    assert failed(broken(centred, range=(-1.0, 1.0), golden=lambda self: None)) == ["each item alone, the same scores"]


class Learner(Brightness, TrainableReward):
    """Adds a constant that an update raises; `forgets` leaves it out of the state."""

    forgets = False

    def __init__(self) -> None:
        self.offset = torch.zeros(())

    def __call__(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> torch.Tensor:
        return means(media) * (1 - self.offset)

    def update(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], step: int
    ) -> dict[str, float]:
        self.offset = self.offset + 0.1
        return {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self.forgets else {"offset": self.offset}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.offset = state.get("offset", self.offset)


def test_the_state_must_hold_all_that_a_reward_learns() -> None:
    assert failed(Learner()) == []
    forgetful = Learner()
    forgetful.forgets = True
    assert "what it learns is saved and restored" in failed(forgetful)


def test_a_reward_that_applies_to_nothing_cannot_be_tried() -> None:
    class Picky(Brightness):
        def applies_to(self, row: Mapping[str, Any]) -> bool:
            return False

    with pytest.raises(RewardError, match="applies to 0 of the 8 items"):
        rewards.check(Picky())


@pytest.mark.parametrize("name", ["colorfulness", "compressibility"])
def test_built_in_rewards_keep_the_contract(name: str) -> None:
    assert failed(rewards.load(name)) == []


def test_ocr_keeps_the_contract() -> None:
    assert failed(rewards.load("ocr", mode="lines")) == []
