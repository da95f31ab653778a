"""MARBLE: balance the gradients of several rewards on DiffusionNFT's loss.

Source: "MARBLE: Multi-Aspect Reward Balance for Diffusion RL" (2605.06507). Each reward k has its own advantages A_k,
and with them its own loss l_k on the same items, noise and forward passes. At every `every`-th update the gradients g_k
of the rewards are computed separately and balanced:

    alpha = argmin over the simplex of || sum_k alpha_k g_k / ||g_k|| ||^2        (min-norm point, MGDA)
    step  = (sum_k alpha_k g_k / ||g_k||) mean_k ||g_k||,    mean_alpha <- ema mean_alpha + (1 - ema) alpha

The updates in between need only one backward pass, since l_k is affine in A_k: with A = sum_k mean_alpha_k A_k,
grad l(A) = sum_k mean_alpha_k grad l_k wherever no reward level is clipped. The KL is not part of the balance.

The recipe's weights w_k are a preference. The paper has none; its rewards weigh the same.

    alpha ~ argmin over alpha >= 0 with sum_k w_k alpha_k = 1 of || sum_k alpha_k g_k / ||g_k|| ||^2

This is the min-norm point of the gradients g_k / (||g_k|| w_k), MGDA with scaled gradients (Desideri 2012). At the
optimum <step, g_k> / ||g_k|| = c w_k where alpha_k > 0, and more elsewhere, with one c > 0: each reward gains along its
own gradient in proportion to its weight, and no reward falls. The step is thus the direction with the largest least
gain by weight, min_k <step, g_k> / (||g_k|| w_k). For two rewards at cosine c, alpha ~ (w_1 - c w_2, w_2 - c w_1), at
least 0; at a right angle these are the weights themselves, and the mean weights start there. Scaling a loss would have
no effect, since gradients enter with unit length. A reward of weight 0 is a monitor: it is scored and logged, and not
learnt from.

A second addition to the paper: a reward may apply to some prompts only. Its loss is then the mean over these prompts,
and the single backward pass weighs each item by the weights of the rewards that apply to it, so that it stays exact.

`balance` also offers two methods to compare MARBLE with. `fixed` is the plain sum (of `advantage: total` or `summed`),
whose conflicts are measured in the same way. RACO (2602.02495) turns the fixed sum away from conflicts: with
g0 = sum_k w_k g_k and G_p = sum_k p_k g_k,

    p = argmin over the simplex of <G_p, g0> + c ||g0|| ||G_p||,   step = g0 + c ||g0|| G_q / ||G_q||,   q = min(p, w)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.advantages import RewardTable, reward_advantages
from flowalign.algorithms.base import Cost, Metrics
from flowalign.algorithms.batches import NoisedBatch
from flowalign.algorithms.forward import Level, predictions, reward_level, squared_error
from flowalign.algorithms.nft import NFT, NFTSettings, contrast
from flowalign.config.algorithm import AlgorithmSettings
from flowalign.config.base import MOST
from flowalign.lazy import clarabel, sparse, torch
from flowalign.lazy import numpy as np

if TYPE_CHECKING:
    from flowalign.config.sections import Rollout, Train
    from flowalign.policies.base import Policy


def min_norm_weights(gram: torch.Tensor) -> torch.Tensor:
    """Weights (K,) on the simplex of the shortest convex combination of K vectors, whose inner products are (K, K)."""
    return preferred_weights(gram, torch.ones(len(gram)))


def preferred_weights(gram: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """Weights (K,) on the simplex of K unit vectors, whose inner products are (K, K), for the preference (K,) > 0.

    The combined step goes along each vector in proportion to its preference; see the module. An equal preference for
    all gives `min_norm_weights`.
    """
    inner = gram.detach().cpu().double().numpy()
    prices = preference.detach().cpu().double().numpy()
    return _cheapest(2 * inner, np.zeros(len(inner)), None, prices / prices.max()).to(gram)


def conflict_averse_weights(gram: torch.Tensor, weights: torch.Tensor, radius: float) -> torch.Tensor:
    """RACO's weights (K,) of K gradients, whose inner products are (K, K), for the fixed `weights` and c = `radius`."""
    inner, fixed = gram.detach().cpu().double().numpy(), weights.detach().cpu().double().numpy()
    inner = inner / (inner.diagonal().max() or 1.0)  # the solver's tolerances are meant for numbers near 1
    length = radius * np.sqrt(max(fixed @ inner @ fixed, 0.0))
    values, vectors = np.linalg.eigh(inner)
    root = vectors * np.sqrt(values.clip(min=0))  # root @ root.T = inner
    chosen = _cheapest(np.zeros_like(inner), inner @ fixed, length * root.T, np.ones(len(inner))).numpy()
    clipped = np.minimum(chosen, fixed)
    norm = np.sqrt(max(clipped @ inner @ clipped, 0.0))
    return torch.from_numpy(fixed + (length * clipped / norm if norm > 0 else 0)).to(gram)


def _cheapest(quadratic: np.ndarray, linear: np.ndarray, cone: np.ndarray | None, prices: np.ndarray) -> torch.Tensor:
    """argmin of p Q p / 2 + q p (+ |cone p|) over p >= 0 with prices p = 1, scaled to the sum 1; float64."""
    size = len(linear)
    tops = 0 if cone is None else 1  # a further unknown, which is at least |cone p|
    rows = [np.append(prices, np.zeros(tops))[None], np.hstack([-np.eye(size), np.zeros((size, tops))])]
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(size)]
    if cone is not None:
        rows += [np.append(np.zeros(size), -1.0)[None], np.hstack([-cone, np.zeros((len(cone), 1))])]
        cones.append(clarabel.SecondOrderConeT(1 + len(cone)))
    bounds = np.zeros(sum(len(row) for row in rows))
    bounds[0] = 1
    full = np.zeros((size + tops, size + tops))
    full[:size, :size] = quadratic
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    problem = sparse.csc_matrix(np.triu(full)), np.append(linear, np.ones(tops)), sparse.csc_matrix(np.vstack(rows))
    solution = clarabel.DefaultSolver(*problem, bounds, cones, settings).solve()
    if solution.status not in (clarabel.SolverStatus.Solved, clarabel.SolverStatus.AlmostSolved):
        raise ArithmeticError(f"the balance of the rewards' gradients was not found: {solution.status}")
    weights = np.array(solution.x[:size]).clip(min=0)
    return torch.from_numpy(weights / weights.sum())


class MarbleSettings(NFTSettings):
    """The settings of MARBLE."""

    name: Literal["marble"] = "marble"  # type: ignore[assignment]
    advantage_std: Literal["global", "group", "none"] = "group"
    """Divisor of the advantages: the standard deviation of the step's rewards, of the group's rewards, or none."""
    balance: Literal["min_norm", "raco", "fixed"] = "min_norm"
    """Method that combines the rewards' gradients: "min_norm" is MARBLE's, with the recipe's weights as a preference,
    "raco" is RACO's, and "fixed" is the weighted sum."""
    every: Annotated[int, Field(gt=0, le=MOST)] = 10
    """Number of updates from one balancing to the next. A balancing costs one backward pass per reward: lower it if the
    gradients' conflicts change quickly."""
    ema: Level = 0.7
    """Share of the earlier mean weights that a balancing keeps. Raise it if the weights jump between balancings."""
    uniform_from: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Update from which the recipe's weights replace the balanced ones, for the paper's last, uniform stage; null:
    never."""
    radius: Annotated[float, Field(ge=0)] = 0.4
    """RACO's c: length of the correction, as a part of the fixed sum's. Raise it to avoid conflicts more strongly."""

    @property
    def parts_rewards(self) -> bool:
        """Always True: MARBLE learns from each reward separately."""
        return True

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """There must be two rewards to balance, and each setting must have an effect."""
        super().check(rollout, train, rewards)
        if rewards < 2:
            raise ValueError(
                "algorithm: marble balances two rewards or more, those of weight 0 not counted; with one, use nft"
            )
        if self.balance != "raco":
            self.refuse("belongs to balance: raco", "radius")
        if self.uniform_from == 0:
            self.refuse("nothing is balanced with uniform_from 0; leave it out", "every", "ema", "balance", "radius")
        if self.balance == "fixed":
            self.refuse("a fixed balance has no weights to move", "ema", "uniform_from")
        else:
            self.refuse("belongs to balance: fixed", "advantage")


class Marble(NFT):
    """MARBLE."""

    Settings: ClassVar[type[AlgorithmSettings]] = MarbleSettings
    settings: MarbleSettings
    _names: tuple[str, ...] = ()
    _fixed: tuple[float, ...] = ()

    def advantages(self, scored: RewardTable, groups: torch.Tensor) -> torch.Tensor:
        """Advantages (N, K), one column per reward; `balance: fixed` adds a column of the sum, which is trained on."""
        self._names = scored.names
        self._fixed = tuple((scored.weights / scored.weights.sum()).tolist())
        columns = reward_advantages(scored, groups, self.settings.advantage_std)
        if self.settings.balance == "fixed":
            columns = torch.cat([columns, super().advantages(scored, groups)[:, None]], dim=1)
        return columns

    def mean_weights(self, update: int) -> torch.Tensor:
        """The rewards' weights (K,) in an update with a single backward pass."""
        fixed = torch.tensor(self._fixed)
        return fixed if self._uniform(update) else self.state.get("weights", fixed)

    def _balances(self, update: int) -> bool:
        """Whether this update balances: every `every`-th one, but not in the uniform stage, whose weights are given."""
        return update % self.settings.every == 0 and not self._uniform(update)

    def _uniform(self, update: int) -> bool:
        return self.settings.uniform_from is not None and update >= self.settings.uniform_from

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """An update that balances computes the rewards' gradients separately."""
        return super().cost(current)._replace(apart=self._balances(0))

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Metrics]:
        """The loss in the module's formula, (L,) in an update that balances; metrics: those of NFT."""
        seen = predictions(policy, batch, "old", reference=self.settings.kl_weight > 0)
        errors = contrast(batch.latents, batch.noise, batch.sigma, seen.policy, seen.snapshot, self.settings.beta)
        positive, negative = (error[:, None] for error in errors)

        def losses(advantages: torch.Tensor) -> torch.Tensor:
            level = reward_level(advantages, self.settings.advantage_clip)
            return self.settings.advantage_clip / self.settings.beta * (level * positive + (1 - level) * negative)

        count = batch.shares.shape[1]
        own, summed = batch.advantages[:, :count], batch.advantages[:, count:]
        if self._balances(batch.update):
            parts = torch.cat([(batch.shares * losses(own)).mean(0), losses(summed).mean(0)])
        elif self.settings.balance == "fixed":
            parts = losses(summed).mean(0)
        else:
            weights = batch.shares * self.mean_weights(batch.update).to(own)
            total = weights.sum(1, keepdim=True)
            mean = (weights * own).sum(1, keepdim=True) / total.clamp(min=1e-12)
            parts = (total * losses(mean)).mean(0)
        metrics = {
            "policy_loss": parts.mean().detach(),
            "old_distance": squared_error(seen.policy, seen.snapshot).detach(),
        }
        if seen.reference is not None:
            kl = squared_error(seen.policy, seen.reference)
            metrics["kl"] = kl.detach()
            parts = torch.cat([parts, self.settings.kl_weight * kl.mean()[None]])
        return (parts if self._balances(batch.update) else parts.sum()), metrics

    def join(self, gram: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, float]]:
        """The weights of the losses [each reward, (their sum), (the KL)]; metrics: cosines with the step, weights."""
        count = len(self._names)
        lengths = gram.diagonal()[:count].clamp(min=0).sqrt()
        alive = lengths > 1e-8 * lengths.max()
        weights = torch.zeros(len(gram), dtype=gram.dtype)
        if self.settings.balance == "fixed":
            weights[count] = 1
        elif alive.any():
            part, fixed = gram[:count, :count][alive][:, alive], torch.tensor(self._fixed, dtype=gram.dtype)
            if self.settings.balance == "min_norm":
                alpha = torch.zeros(count, dtype=gram.dtype)
                unit = part / lengths[alive].outer(lengths[alive])
                alpha[alive] = preferred_weights(unit, fixed[alive])
                weights[:count][alive] = alpha[alive] / lengths[alive] * lengths.mean()
            else:
                weights[:count][alive] = conflict_averse_weights(part, fixed[alive], self.settings.radius)
                alpha = weights[:count]
            kept = self.state.get("weights", fixed).to(alpha)
            self.state["weights"] = self.settings.ema * kept + (1 - self.settings.ema) * alpha
        step = gram[:count] @ weights
        length = (weights @ gram @ weights).clamp(min=0).sqrt()
        cosines = step / (length * lengths).clamp(min=1e-30)
        if self.settings.kl_weight:
            weights[-1] = 1
        pairs = gram[:count, :count][torch.triu(torch.ones(count, count, dtype=torch.bool), 1)]
        metrics = {f"cosine/{name}": float(value) for name, value in zip(self._names, cosines, strict=True)}
        if "weights" in self.state:
            named = zip(self._names, self.state["weights"], strict=True)
            metrics |= {f"weight/{name}": float(value) for name, value in named}
        metrics["worst_cosine"] = float(cosines.min())
        metrics["conflict"] = float((pairs < 0).double().mean())
        return weights, metrics
