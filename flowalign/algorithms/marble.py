"""MARBLE: balance the gradients of several rewards on DiffusionNFT's loss.

Source: "MARBLE: Multi-Aspect Reward Balance for Diffusion RL" (2605.06507). Each reward k has its own advantages A_k
and with them its own loss l_k on the same items, noise and forward passes. On every `every`-th update their gradients
g_k are taken apart:

    alpha = argmin over the simplex of || sum_k alpha_k g_k / ||g_k|| ||^2        (min-norm point, MGDA)
    step  = (sum_k alpha_k g_k / ||g_k||) mean_k ||g_k||,    mean_alpha <- ema mean_alpha + (1 - ema) alpha

and in between one backward pass is enough, since l_k is affine in A_k: with A = sum_k mean_alpha_k A_k,
grad l(A) = sum_k mean_alpha_k grad l_k wherever no reward level is clipped. The KL stays outside of the balance.

The recipe's weights w_k are a preference, which the paper does not have (its rewards weigh alike):

    alpha ~ argmin over alpha >= 0 with sum_k w_k alpha_k = 1 of || sum_k alpha_k g_k / ||g_k|| ||^2

the min-norm point of the gradients g_k / (||g_k|| w_k), MGDA with scaled gradients (Desideri 2012). Its optimality
says <step, g_k> / ||g_k|| = c w_k where alpha_k > 0, and more elsewhere, with one c > 0: along their own gradients
rewards gain in proportion to their weights, and none falls. So it is the direction of the largest least gain by weight,
min_k <step, g_k> / (||g_k|| w_k). Of two rewards at cosine c, alpha ~ (w_1 - c w_2, w_2 - c w_1), at least 0: at a
right angle their weights themselves, from which the mean weights start. A scaled loss would do nothing, since gradients
are taken at unit length. A weight of 0 is a monitor: scored and logged, never learnt from.

Beyond the paper too: a reward may apply to some prompts only. Its loss is then the mean over those, and the amortised
step weighs each item by the weights of the rewards that apply to it, so that it stays exact. `balance` also gives what
MARBLE is compared with: the plain sum (`fixed`, of `advantage: total` or `summed`), whose conflicts are measured alike,
and RACO (2602.02495), which turns the fixed sum away from conflicts: with g0 = sum_k w_k g_k, G_p = sum_k p_k g_k,

    p = argmin over the simplex of <G_p, g0> + c ||g0|| ||G_p||,   step = g0 + c ||g0|| G_q / ||G_q||,   q = min(p, w)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from flowalign.advantages import RewardTable, reward_advantages
from flowalign.algorithms.base import Cost, Figures
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
    """(K,) on the simplex: the weights of the shortest convex combination of K vectors of inner products (K, K)."""
    return preferred_weights(gram, torch.ones(len(gram)))


def preferred_weights(gram: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
    """(K,) on the simplex: the weights of K unit vectors, of inner products (K, K), in a step along each in proportion.

    `preference` (K,) is positive, and says in which; see the module. Equal ones give `min_norm_weights`.
    """
    inner = gram.detach().cpu().double().numpy()
    prices = preference.detach().cpu().double().numpy()
    return _cheapest(2 * inner, np.zeros(len(inner)), None, prices / prices.max()).to(gram)


def conflict_averse_weights(gram: torch.Tensor, weights: torch.Tensor, radius: float) -> torch.Tensor:
    """RACO's weights (K,) of K gradients of inner products (K, K), for the fixed `weights` (K,) and c = `radius`."""
    inner, fixed = gram.detach().cpu().double().numpy(), weights.detach().cpu().double().numpy()
    inner = inner / (inner.diagonal().max() or 1.0)  # the solver's tolerances are those of numbers near 1
    length = radius * np.sqrt(max(fixed @ inner @ fixed, 0.0))
    values, vectors = np.linalg.eigh(inner)
    root = vectors * np.sqrt(values.clip(min=0))  # root @ root.T = inner
    chosen = _cheapest(np.zeros_like(inner), inner @ fixed, length * root.T, np.ones(len(inner))).numpy()
    clipped = np.minimum(chosen, fixed)
    norm = np.sqrt(max(clipped @ inner @ clipped, 0.0))
    return torch.from_numpy(fixed + (length * clipped / norm if norm > 0 else 0)).to(gram)


def _cheapest(quadratic: np.ndarray, linear: np.ndarray, cone: np.ndarray | None, prices: np.ndarray) -> torch.Tensor:
    """argmin of p Q p / 2 + q p (+ |cone p|) over p >= 0 with prices p = 1, by Clarabel, made to sum to 1; float64."""
    size = len(linear)
    tops = 0 if cone is None else 1  # one more unknown, at least |cone p|
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
    """What a recipe may say of MARBLE."""

    name: Literal["marble"] = "marble"  # type: ignore[assignment]
    advantage_std: Literal["global", "group", "none"] = "group"
    """Divide advantages by the standard deviation of the whole step's rewards, of the group's, or by none."""
    balance: Literal["min_norm", "raco", "fixed"] = "min_norm"
    """How the rewards' gradients are joined: MARBLE's, with the recipe's weights as a preference, RACO's, or summed."""
    every: Annotated[int, Field(gt=0, le=MOST)] = 10
    """Updates from one balancing, with a backward pass for each reward, to the next."""
    ema: Level = 0.7
    """How much of the mean weights a balancing keeps."""
    uniform_from: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """The update from which only the recipe's weights count, for the paper's last, uniform stage; null: never."""
    radius: Annotated[float, Field(ge=0)] = 0.4
    """RACO's c: how far it may turn from the fixed sum."""

    @property
    def parts_rewards(self) -> bool:
        """Always: that is what it is for."""
        return True

    def check(self, rollout: Rollout, train: Train, rewards: int) -> None:
        """There must be something to balance."""
        super().check(rollout, train, rewards)
        if rewards < 2:
            raise ValueError(
                "algorithm: marble balances two rewards or more; with one, use nft (one of weight 0 does not count)"
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
        """One column a reward, and a last one of the sum where that is what is trained on."""
        self._names = scored.names
        self._fixed = tuple((scored.weights / scored.weights.sum()).tolist())
        columns = reward_advantages(scored, groups, self.settings.advantage_std)
        if self.settings.balance == "fixed":
            columns = torch.cat([columns, super().advantages(scored, groups)[:, None]], dim=1)
        return columns

    def mean_weights(self, update: int) -> torch.Tensor:
        """The weights (K,) of an update with a single backward pass."""
        fixed = torch.tensor(self._fixed)
        return fixed if self._uniform(update) else self.state.get("weights", fixed)

    def _balances(self, update: int) -> bool:
        """Every so many updates, but not in the last stage, whose weights are known."""
        return update % self.settings.every == 0 and not self._uniform(update)

    def _uniform(self, update: int) -> bool:
        return self.settings.uniform_from is not None and update >= self.settings.uniform_from

    def cost(self, current: frozenset[str] | set[str]) -> Cost:
        """An update that balances takes gradients apart."""
        return super().cost(current)._replace(apart=self._balances(0))

    def loss(self, policy: Policy, batch: NoisedBatch) -> tuple[torch.Tensor, Figures]:
        """See the module; figures: those of NFT."""
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
        figures = {
            "policy_loss": parts.mean().detach(),
            "old_distance": squared_error(seen.policy, seen.snapshot).detach(),
        }
        if seen.reference is not None:
            kl = squared_error(seen.policy, seen.reference)
            figures["kl"] = kl.detach()
            parts = torch.cat([parts, self.settings.kl_weight * kl.mean()[None]])
        return (parts if self._balances(batch.update) else parts.sum()), figures

    def join(self, gram: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, float]]:
        """The step's weights of [each reward, (their sum), (the KL)]; figures: cosines of step and rewards, weights."""
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
        figures = {f"cosine/{name}": float(value) for name, value in zip(self._names, cosines, strict=True)}
        if "weights" in self.state:
            named = zip(self._names, self.state["weights"], strict=True)
            figures |= {f"weight/{name}": float(value) for name, value in named}
        figures["worst_cosine"] = float(cosines.min())
        figures["conflict"] = float((pairs < 0).double().mean())
        return weights, figures
