"""Every algorithm through the one loop, on a tiny model: it trains, goes on exactly, and logs what it should."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowalign.algorithms.batches import Batches
from flowalign.config import Model, Recipe, recipe_from_dict
from flowalign.config.base import UserError
from flowalign.policies.base import Policy
from flowalign.policies.loading import load_policy
from flowalign.rollout.stages import Weighted
from flowalign.trainer import Trainer, train
from flowalign.training.display import Display
from flowalign.training.idle import score_metrics
from flowalign.training.processes import Share

JUDGES = """
import torch
from rewards import Reward
def brightness(media, prompts, metadata):
    return media.flatten(1).mean(1)
def negative(media, prompts, metadata):
    return -media.flatten(1).mean(1)
class Redness(Reward):
    def applies_to(self, row):
        return "two" in row["prompt"] or "four" in row["prompt"]
    def __call__(self, media, prompts, metadata):
        return media[:, 0].flatten(1).mean(1) - media[:, 1].flatten(1).mean(1)
def constant(media, prompts, metadata):
    return torch.ones(len(media))
class FlatRedness(Redness):
    def __call__(self, media, prompts, metadata):
        return torch.ones(len(media))
class OthersBrightness(Reward):
    def applies_to(self, row):
        return not Redness().applies_to(row)
    def __call__(self, media, prompts, metadata):
        return media.flatten(1).mean(1)
"""

# What each run is told beside the tiny recipe; two steps of guided groups of 4 for all.
RUNS: dict[str, dict[str, Any]] = {
    "nft": {"algorithm": {"name": "nft", "kl_weight": 0.1, "old_decay": {"start": 2, "slope": 0.1}}},
    "crd": {
        "algorithm": {
            "name": "crd",
            "old_decay": {"start": 2, "slope": 0.1},
            "sampling_decay": {"first": 0.5},
        }
    },
    "gdro": {"algorithm": {"name": "gdro", "beta": 10}},
    "marble": {"algorithm": {"name": "marble", "every": 2}, "rewards": "two"},
    "marble_raco": {"algorithm": {"name": "marble", "every": 3, "balance": "raco", "kl_weight": 0.1}, "rewards": "two"},
    "marble_fixed": {"algorithm": {"name": "marble", "every": 2, "balance": "fixed"}, "rewards": "two"},
    "prdp": {"algorithm": {"name": "prdp"}, "rollout": {"steps": 3, "window": [0, 2], "noise_level": 0.7}},
    "guard": {"algorithm": {"name": "flow_grpo", "ratio": "guard", "clip_range": 1e-2}, "rollout": {"steps": 3}},
    "dense": {
        "algorithm": {"name": "flow_grpo", "values": "dense", "absolute": 0.1, "clip_range": 1e-2},
        "rollout": {"steps": 3},
    },
    "memoryless": {
        "algorithm": {"name": "flow_grpo", "clip_range": 1e-2},
        "rollout": {"steps": 3, "dynamics": "memoryless", "shared_noise": True},
    },
    "linear": {
        "algorithm": {"name": "flow_grpo", "advantage_std": "largest_group", "kl_weight": 0.004, "clip_range": 1e-2},
        "rollout": {"steps": 3, "dynamics": "linear_sde"},
    },
    "random_window": {
        "algorithm": {"name": "flow_grpo", "values": "dense", "clip_range": 1e-2},
        "rollout": {"steps": 4, "window_size": 1},
    },
    "sliding_window": {
        "algorithm": {"name": "flow_grpo", "advantage": "summed", "clip_range": 1e-2},
        "rollout": {"steps": 4, "window_size": 1, "window_moves": "sliding", "window_interval": 1},
        "rewards": "two",
    },
    "copied_nft": {"algorithm": {"name": "nft", "advantage": "summed", "old_decay": {}}, "rewards": "two"},
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plots take longer than the runs; tests/evaluate/test_report.py shows it."""
    monkeypatch.setattr("flowalign.trainer.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def make(values: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """Makes the recipe of a run of RUNS, in its folder."""
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGES)
    brightness = {"load": f"{judge}:brightness"}

    def _make(run: str, folder: str = "run", **more: Any) -> Recipe:
        told = RUNS[run]
        two = {"brightness": brightness, "redness": {"load": f"{judge}:Redness", "weight": 2.0}}
        train_more = more.pop("train", {})
        algorithm = {**told["algorithm"], **more.pop("algorithm", {})}
        return recipe_from_dict(
            {
                **values,
                "rewards": two if told.get("rewards") else {"brightness": brightness},
                "algorithm": algorithm,
                "rollout": {"steps": 2, "batch": 8, **told.get("rollout", {})},
                "train": {**values["train"], "micro_batch": 8, **train_more},
                "evaluation": {},
                "run": {"folder": str(tmp_path / folder), "checkpoint_every": 1},
                **more,
            }
        )

    return _make


def quiet_train(recipe: Recipe, **more: Any) -> Path:
    return train(recipe, display=Display(quiet=True), **more)


def metrics(folder: Path, *left_out: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("minutes", "seconds", *left_out)} for line in lines
    ]


def kept(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = (folder / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


# Through the loop


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_one_step_and_two_resumed_steps_equal_three(run: str, make: Callable[..., Recipe]) -> None:
    whole = quiet_train(make(run, "whole", train={"steps": 3}))
    quiet_train(make(run, "parts", train={"steps": 1}))
    parts = quiet_train(make(run, "parts", train={"steps": 3}), resume=True)
    lines = metrics(whole)
    assert lines == metrics(parts)
    assert all(line["grad_norm"] > 0 for line in lines)
    a, b = kept(whole, 3), kept(parts, 3)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    snapshots = {name.split("/")[1] for name in a if name.startswith("snapshots/")}
    wanted = {"nft": {"old"}, "marble": {"old"}, "crd": {"old", "sampling"}}
    assert snapshots == wanted.get(make(run).algorithm.name, set())
    for snapshot in snapshots:  # by the third step they follow at a distance, unless they are copies
        pairs = [(a[f"snapshots/{snapshot}/{n}"], a[f"weights/{n}"]) for n in names_of_weights(a)]
        assert any(not torch.equal(old, now) for old, now in pairs) == (run != "copied_nft")
    assert ("algorithm/weights" in a) == (run in ("marble", "marble_raco"))


def names_of_weights(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removeprefix("weights/") for name in tensors if name.startswith("weights/")]


@pytest.mark.parametrize("run", ["nft", "marble_raco"])
def test_a_recipe_trained_again_gives_the_same_numbers(run: str, make: Callable[..., Recipe]) -> None:
    """Nothing of a run stays in the recipe: several runs of one recipe in one process begin alike."""
    recipe = make(run, "first", train={"steps": 2})
    first = metrics(quiet_train(recipe))
    place = recipe.run.model_copy(update={"folder": f"{recipe.folder}-again"})
    assert metrics(quiet_train(recipe.model_copy(update={"run": place}))) == first


@pytest.mark.parametrize("run", ["nft", "crd", "gdro", "marble", "prdp"])
def test_micro_batches_do_not_change_the_update(run: str, make: Callable[..., Recipe]) -> None:
    """prdp's and the groups' losses are means over whole groups, so they add up as those of single items do."""
    one, many, parts = (
        metrics(quiet_train(make(run, f"of{size}", train={"steps": 1, "micro_batch": size, "updates_per_step": 1})))[0]
        for size in (100, 8, 3)
    )
    for line in (many, parts):
        assert line["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert line["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("run", ["gdro", "prdp", "guard"])
def test_groups_without_spread_teach_nothing_and_cause_no_error(
    run: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    rewards = {"constant": {"load": f"{tmp_path / 'judge.py'}:constant"}}
    lines = metrics(quiet_train(make(run, rewards=rewards, train={"steps": 2})))
    assert [line["zero_spread"] for line in lines] == [1.0, 1.0]
    assert [line["grad_norm"] for line in lines] == [0.0, 0.0]


@pytest.mark.parametrize("run", ["nft", "crd", "marble", "gdro", "prdp", "guard", "dense", "sliding_window"])
@pytest.mark.parametrize("equal_groups", ["skip", "keep"])
def test_the_reported_spread_counts_differing_groups_whichever_groups_are_kept(
    run: str, equal_groups: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    judge = "def half(media, prompts, metadata):\n"
    judge += "    return [float(m.mean()) if 'two' in p else 1.0 for m, p in zip(media, prompts)]\n"
    (tmp_path / "half.py").write_text(judge)
    half = {"load": f"{tmp_path / 'half.py'}:half"}
    rewards = {"half": half, **({"again": half} if "rewards" in RUNS[run] else {})}
    more = {"steps": 1, "prompts_per_step": 4}
    recipe = make(run, rewards=rewards, train=more, algorithm={"equal_groups": equal_groups})
    (line,) = metrics(quiet_train(recipe))
    assert line["zero_spread"] == 0.75
    assert line["grad_norm"] > 0


def weighed(trainer: Trainer) -> Weighted:
    """The samples of the first step, weighed."""
    return trainer._weighted(trainer._scored(trainer.source.next(trainer.policy, 0)))


def batches(trainer: Trainer, weighted: Weighted, step: int = 0, turn: int = 0) -> Batches[Any]:
    return trainer.algorithm.batches(weighted, trainer.learner._turn(step, turn))


@pytest.mark.parametrize("run", ["gdro", "prdp", "nft"])
def test_a_process_without_units_takes_part_with_a_finite_loss(run: str, make: Callable[..., Recipe]) -> None:
    """Its gradient counts for nothing, but 0 times NaN would not."""
    trainer = Trainer.from_recipe(make(run), display=Display(quiet=True))
    weighted = weighed(trainer)
    items = batches(trainer, weighted)
    others = Share(torch.empty(0, dtype=torch.long), total=1, most=1)
    ((nothing, counted),) = trainer.learner._chunks(items, items.units()[:0], others)
    assert counted == 0
    loss, _ = trainer.algorithm.loss(trainer.policy, items.batch(nothing, 0))
    gradients = torch.autograd.grad(loss, trainer.learner.parameters, allow_unused=True)
    assert loss.isfinite() and all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_an_idle_process_takes_part_with_a_finite_loss_where_a_reward_teaches_no_sample(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Its own groups are those to which the reward applies and that do not teach: infinity times 0 is NaN."""
    judge = tmp_path / "judge.py"
    rewards = {"flat": {"load": f"{judge}:FlatRedness"}, "others": {"load": f"{judge}:OthersBrightness"}}
    more = {"algorithm": {"equal_groups": "skip"}, "train": {"prompts_per_step": 4}}
    trainer = Trainer.from_recipe(make("marble", rewards=rewards, **more), display=Display(quiet=True))
    samples = weighed(trainer)
    flat = torch.tensor([int(not teaches) for teaches in samples.teaches]).argmax().item()
    assert samples.teaches.any() and not samples.teaches.all()
    items = batches(trainer, samples)
    for update in (0, 1):  # several gradients, and one
        loss, _ = trainer.algorithm.loss(trainer.policy, items.batch(torch.tensor([[[flat, 0]]]), update))
        gradients = torch.autograd.grad((loss * 0).sum(), trainer.learner.parameters, allow_unused=True)
        assert loss.isfinite().all() and all(gradient is None or (gradient == 0).all() for gradient in gradients)


def test_dense_values_of_negative_rewards_are_refused(make: Callable[..., Recipe], tmp_path: Path) -> None:
    rewards = {"negative": {"load": f"{tmp_path / 'judge.py'}:negative"}}
    with pytest.raises(UserError, match="step 1: VGPO weighs steps by their values, so rewards must be at least 0"):
        quiet_train(make("dense", rewards=rewards))


def test_a_range_with_too_few_sigmas_is_found_before_the_first_step(make: Callable[..., Recipe]) -> None:
    recipe = make("nft", algorithm={"timestep_range": [0.0, 0.9]})
    with pytest.raises(UserError, match=r"holds 1 of the rollout's sigmas; algorithm.timesteps needs 2"):
        Trainer.from_recipe(recipe, display=Display(quiet=True))
    assert not recipe.folder.exists()


def test_moving_windows_train_one_step_at_a_time(make: Callable[..., Recipe]) -> None:
    """4 denoising steps for 8 pictures, and 8 items: one stochastic step of each."""
    lines = metrics(quiet_train(make("sliding_window", train={"steps": 2})))
    assert [line["forwards"] for line in lines] == [8 * 4 + 8, 2 * (8 * 4 + 8)]


@pytest.mark.parametrize("run", ["nft", "crd"])
def test_the_noise_of_an_item_depends_on_its_prompt_and_not_on_the_groups_of_the_process(
    run: str, make: Callable[..., Recipe]
) -> None:
    trainer = Trainer.from_recipe(make(run, algorithm={"timestep_sampling": "uniform"}), display=Display(quiet=True))
    both = weighed(trainer)
    drawn = both.generated
    generated = replace(
        drawn,
        rows=drawn.rows[4:],
        groups=drawn.groups[4:] - 1,
        condition=drawn.condition[1:],
        latents=drawn.latents[4:],
        members=drawn.members[4:],
    )
    rest = {name: getattr(both, name)[4:] for name in ("total", "advantages", "shares", "teaches", "differs")}
    second = replace(both, generated=generated, **rest)
    whole, part = (batches(trainer, samples, 5) for samples in (both, second))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(2))  # the second prompt's pictures, each level
    ours = part.batch(places[:, None], 0)
    theirs = whole.batch((places + torch.tensor([4, 0]))[:, None], 0)
    first = whole.batch(places[:, None], 0)
    assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.sigma, theirs.sigma)
    assert torch.equal(ours.state, theirs.state)
    assert not torch.isin(first.sigma, ours.sigma).any()
    # Of a group's 4 pictures x 2 levels, all differ, or the pictures share each level's sigma and noise.
    distinct = 2 if run == "crd" else 8
    assert len(ours.sigma.unique()) == len(torch.unique(ours.noise.flatten(1), dim=0)) == distinct
    again = batches(trainer, both, 6).batch(places[:, None], 0)
    other = batches(trainer, both, 5, 1).batch(places[:, None], 0)
    assert len(torch.unique(torch.cat([first.sigma, again.sigma, other.sigma]))) == 3 * distinct


# The snapshot's forward


def forwards_of_items(lines: list[dict[str, Any]], rollout: int) -> list[int]:
    totals = [0] + [line["forwards"] for line in lines]
    return [now - before - rollout for before, now in pairwise(totals)]


@pytest.mark.parametrize("run", ["nft", "crd", "marble"])
def test_the_snapshots_forward_pass_is_skipped_while_it_equals_the_weights(
    run: str, make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 pictures in 2 denoising steps; 16 items in 2 updates, the first of which starts at the snapshot."""
    copied = {"kl_weight": 0.0, "old_decay": {}}
    saved = metrics(quiet_train(make(run, "saved", train={"steps": 2}, algorithm=copied)))
    assert forwards_of_items(saved, rollout=16) == [8 + 2 * 8] * 2
    monkeypatch.setattr(Policy, "is_current", lambda policy, name: False)
    spent = metrics(quiet_train(make(run, "spent", train={"steps": 2}, algorithm=copied)))
    assert forwards_of_items(spent, rollout=16) == [2 * 16] * 2
    for a, b in zip(saved, spent, strict=True):
        assert {**a, "forwards": 0} == {**b, "forwards": 0}


def test_a_snapshot_that_lags_behind_is_never_taken_for_the_weights(make: Callable[..., Recipe]) -> None:
    lagging = {"kl_weight": 0.0, "old_decay": {"first": 0.5, "last": 0.5}}
    lines = metrics(quiet_train(make("nft", train={"steps": 2}, algorithm=lagging)))
    assert forwards_of_items(lines, rollout=16) == [8 + 2 * 8, 2 * 16]
    assert lines[1]["metrics"]["old_distance"] > 0


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return load_policy(Model(path=str(tiny_model), height=64, width=64, dtype="fp32", max_sequence_length=0))


def moved(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.1
    policy.weights_changed()


def test_a_snapshot_is_current_until_the_weights_change_and_again_after_a_copy(policy: Policy) -> None:
    assert not policy.is_current("old")
    policy.snapshot("old")
    policy.snapshot("other")
    assert policy.is_current("old") and policy.is_current("other")
    moved(policy)
    assert not policy.is_current("old")
    policy.blend("old", 0.5)
    assert not policy.is_current("old")
    policy.blend("old", 0.0)
    assert policy.is_current("old") and not policy.is_current("other")
    assert all(torch.equal(policy.snapshots["old"][name], weight) for name, weight in policy.trainable_state().items())


def test_after_loading_the_snapshots_that_equal_the_weights_are_found(policy: Policy) -> None:
    policy.snapshot("old")
    before = policy.trainable_state()
    moved(policy)
    policy.snapshot("new")
    after = policy.trainable_state()
    policy.load_trainable_state(before)
    assert policy.is_current("old") and not policy.is_current("new")
    policy.load_trainable_state(after)
    assert policy.is_current("new") and not policy.is_current("old")


def test_blending_goes_from_the_snapshot_to_the_weights(policy: Policy) -> None:
    policy.snapshot("old")
    before = policy.trainable_state()
    moved(policy)
    policy.blend("old", 0.75)
    for name, weight in policy.trainable_state().items():
        torch.testing.assert_close(policy.snapshots["old"][name], 0.75 * before[name] + 0.25 * weight)


# The balance of several rewards

BALANCE = {"cosine/brightness", "cosine/redness", "worst_cosine", "conflict"}
WEIGHTS = {"weight/brightness", "weight/redness"}


@pytest.mark.parametrize(("run", "figures"), [("marble", BALANCE | WEIGHTS), ("marble_fixed", BALANCE)])
def test_balancing_updates_log_the_rewards_conflicts(run: str, figures: set[str], make: Callable[..., Recipe]) -> None:
    """2 updates a step, of which every 4th balances: those of the first and the third step."""
    lines = metrics(quiet_train(make(run, train={"steps": 3}, algorithm={"every": 4})))
    seen = [set(line["metrics"]) & (BALANCE | WEIGHTS) for line in lines]
    assert seen == [figures, set(), figures]
    for line in (lines[0]["metrics"], lines[2]["metrics"]):
        cosines = [line["cosine/brightness"], line["cosine/redness"]]
        assert line["worst_cosine"] == min(cosines) and all(-1 <= cosine <= 1 for cosine in cosines)
        assert line["conflict"] in (0.0, 1.0)  # of one pair
        if run == "marble":
            assert line["weight/brightness"] + line["weight/redness"] == pytest.approx(1)
            assert line["worst_cosine"] > 0  # the min-norm step helps every reward


def test_the_mean_weights_of_the_balance_are_kept_in_checkpoints(make: Callable[..., Recipe]) -> None:
    folder = quiet_train(make("marble_raco", train={"steps": 1}))
    logged = metrics(folder)[0]["metrics"]
    weights = kept(folder, 1)["algorithm/weights"].tolist()
    assert weights == pytest.approx([logged["weight/brightness"], logged["weight/redness"]])
    assert weights != pytest.approx([0.5, 0.5])


SUMMED = {"name": "flow_grpo", "advantage": "summed", "clip_range": 1e-2}


@pytest.mark.parametrize("algorithm", [{}, {"balance": "raco"}, {"balance": "fixed"}, SUMMED])
def test_a_reward_of_weight_0_is_logged_and_changes_nothing(
    algorithm: dict[str, Any], make: Callable[..., Recipe], tmp_path: Path
) -> None:
    judge = tmp_path / "judge.py"
    two = {"brightness": {"load": f"{judge}:brightness"}, "redness": {"load": f"{judge}:Redness", "weight": 2.0}}
    watched = {**two, "watched": {"load": f"{judge}:negative", "weight": 0}}
    run = "sliding_window" if algorithm is SUMMED else "marble"
    plain, more = (
        metrics(quiet_train(make(run, f"of{len(rewards)}", rewards=rewards, algorithm=algorithm, train={"steps": 2})))
        for rewards in (two, watched)
    )
    for line in more:
        assert line["reward"].pop("watched") < 0 < line["reward_std"].pop("watched")
    assert more == plain


@pytest.mark.parametrize("balance", ["min_norm", "raco", "fixed"])
def test_the_rewards_weights_matter_in_every_balance(balance: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    steps = []
    for weight in (1.0, 100.0):
        rewards = {
            "brightness": {"load": f"{judge}:brightness", "weight": weight},
            "redness": {"load": f"{judge}:Redness"},
        }
        folder = f"of{weight:g}"
        algorithm = {"balance": balance, "every": 1}
        steps.append(metrics(quiet_train(make("marble", folder, rewards=rewards, algorithm=algorithm)))[0]["metrics"])
    even, uneven = steps
    assert uneven["cosine/brightness"] > even["cosine/brightness"] + 0.01
    if balance == "min_norm":  # rewards gain as they weigh, and none is harmed
        assert even["weight/brightness"] == pytest.approx(0.5, abs=1e-4) and uneven["weight/brightness"] > 0.55
        assert even["cosine/brightness"] == pytest.approx(even["cosine/redness"], rel=1e-2)
        gains = uneven["cosine/brightness"], 100 * uneven["cosine/redness"]
        assert gains[0] == pytest.approx(gains[1], rel=0.05) or gains[0] < gains[1]
        assert uneven["worst_cosine"] > 0


def test_a_weight_that_applies_to_no_prompt_is_refused(make: Callable[..., Recipe], tmp_path: Path) -> None:
    """Each prompt has one reward: its total is that reward, whatever it weighs."""
    judge = tmp_path / "judge.py"
    rewards = {"others": {"load": f"{judge}:OthersBrightness"}, "redness": {"load": f"{judge}:Redness", "weight": 2}}
    with pytest.raises(UserError, match=r"rewards\.redness\.weight 2 has no effect: no prompt that this reward judges"):
        Trainer.from_recipe(make("nft", rewards=rewards), display=Display(quiet=True))
    assert Trainer.from_recipe(make("marble", rewards=rewards), display=Display(quiet=True))


def test_prompts_that_only_a_monitor_judges_are_refused_before_a_model_loads(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    rewards = {
        "redness": {"load": f"{tmp_path / 'judge.py'}:Redness"},
        "brightness": {"load": "colorfulness", "weight": 0},
    }
    recipe = make("nft", rewards=rewards, model={"path": str(tmp_path / "none")})
    with pytest.raises(UserError, match=r"cannot be judged by redness"):
        Trainer.from_recipe(recipe, display=Display(quiet=True))


def test_a_reward_that_applies_to_some_prompts_is_averaged_over_those(make: Callable[..., Recipe]) -> None:
    """4 prompts in a step, 2 of which have a redness."""
    recipe = make("marble", train={"steps": 1, "prompts_per_step": 4})
    trainer = Trainer.from_recipe(recipe, display=Display(quiet=True))
    scored = trainer._scored(trainer.source.next(trainer.policy, 0))
    samples = trainer._weighted(scored)
    figures = score_metrics(scored, samples)
    red = torch.tensor(["two" in prompt or "four" in prompt for prompt in scored.generated.prompts])
    assert scored.rewards.applies.tolist() == [[True] * 16, red.tolist()]
    assert figures["reward"]["redness"] == pytest.approx(scored.rewards.values[1][red].mean().item())
    assert samples.shares[:, 1].tolist() == [2.0 if of else 0.0 for of in red]
    assert (samples.advantages[~red, 1] == 0).all() and (samples.advantages[red, 1] != 0).all()
