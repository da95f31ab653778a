"""PickScore that is tuned while the policy learns, so that reference pictures keep beating generated ones.

Source: Adv-GRPO, "The Image as Its Own Reward" (2511.20256), and its released code. When the generated pictures of a
step score higher on average than the references of their prompts, PickScore's choice between the two is trained to the
reference: loss = -log(e^s(reference) / (e^s(reference) + e^s(generated))), s = exp(logit scale) cos, on the last vision
blocks. What differs from the code: the step's rollouts still train the policy; Adam holds the trained blocks alone, in
float32, where steps of 5e-6 round to nothing in bfloat16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rewards.base import RewardError, TrainableReward, at_least_one
from rewards.frames import chosen_frames
from rewards.learning import counted, load_training_state, training_state
from rewards.media import pictures_by_prompt, read_picture
from rewards.pickscore import MODEL, PickScore

COLLAPSED_SPREAD = 1e-4  # of cosines
PATIENCE = 10  # training steps in a row before an alarm

Reference = tuple[str, int]  # a prompt, and which of its reference pictures


class AdversarialPickScore(PickScore, TrainableReward):
    """See the module.

    references: .json file {prompt: [picture, ...]}; the reward applies to its prompts. layers: vision blocks, from the
    last, that are tuned. updates: steps on the pairs of a step whose generated pictures win. batch: pairs in one.
    processor, divisor, batch_size, frames and device are those of `PickScore`.
    """

    name = "adversarial_pickscore"
    changes_weights = True

    def __init__(
        self,
        references: str,
        model: str = MODEL,
        layers: int = 1,
        updates: int = 1,
        batch: int = 16,
        learning_rate: float = 5e-6,
        seed: int = 0,
        processor: str | None = None,
        divisor: float = 26.0,
        batch_size: int = 64,
        frames: int = 4,
        device: str | None = None,
    ):
        at_least_one(self.name, layers=layers, updates=updates, batch=batch)
        if not learning_rate > 0:
            raise RewardError(f"reward {self.name!r}: learning_rate must be above 0, not {learning_rate}")
        files = pictures_by_prompt(references, self.name, "references")
        super().__init__(model, processor, divisor, batch_size, frames, device)
        blocks = _vision_blocks(self.clip)
        if layers > len(blocks):
            raise RewardError(f"reward {self.name!r}: layers {layers} exceeds the model's {len(blocks)} vision blocks")
        self.blocks = nn.ModuleList(blocks[-layers:]).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.blocks.parameters(), lr=learning_rate)
        self.references = {prompt: [read_picture(path) for path in paths] for prompt, paths in files.items()}
        self.updates, self.batch, self.seed = updates, batch, seed
        self.taken = 0
        self.beaten = 0  # training steps in a row in which the references lost

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts with reference pictures."""
        return row["prompt"] in self.references

    def update(
        self, media: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], step: int
    ) -> dict[str, float]:
        """Train where the generated pictures beat the references; figures: both means, the loss if there was one."""
        frames, count = chosen_frames(media, self.frames)
        texts = [prompt for prompt in prompts for _ in range(count)]
        pairs = [(text, place % len(self.references[text])) for place, text in enumerate(texts)]
        generated = self.factor * self.cosines(frames, texts)
        reference = self._reference_scores(pairs)
        figures = {"generated": generated.mean().item(), "reference": reference.mean().item()}
        self._watch(figures, generated)
        if not self.beaten:
            return figures
        order = torch.randperm(len(frames), generator=counted(self.seed, step)).tolist()
        scale = self.clip.model.logit_scale.exp()
        for turn in range(self.updates):
            start = turn * self.batch % len(order)
            chosen = order[start : start + self.batch]
            words = self.text_features([texts[i] for i in chosen])
            won = self._embedded([self._picture(pairs[i]) for i in chosen])
            lost = self._embedded(list(frames[chosen]))
            loss = -F.logsigmoid(scale * ((won - lost) * words).sum(-1)).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.taken += 1
            figures["loss"] = loss.item()
        figures["updates"] = float(self.taken)
        return figures

    def _watch(self, figures: Mapping[str, float], generated: torch.Tensor) -> None:
        self.beaten = self.beaten + 1 if figures["generated"] > figures["reference"] else 0
        self.alarm = None
        if len(generated) > 1 and generated.std() < COLLAPSED_SPREAD * self.factor:
            self.alarm = "collapsed: it scores all generated pictures alike; use a smaller learning_rate"
        elif self.beaten >= PATIENCE:
            self.alarm = (
                f"overrun: generated pictures beat the references for {self.beaten} steps in a row in spite of its "
                "tuning; use more updates, more layers or a larger learning_rate"
            )

    def _picture(self, reference: Reference) -> torch.Tensor:
        prompt, place = reference
        return self.references[prompt][place]

    def _reference_scores(self, references: Sequence[Reference]) -> torch.Tensor:
        """Scores (B,), of each distinct reference once and of those of one size together."""
        sizes: dict[torch.Size, list[Reference]] = {}
        for one in dict.fromkeys(references):
            sizes.setdefault(self._picture(one).shape, []).append(one)
        found: dict[Reference, torch.Tensor] = {}
        for alike in sizes.values():
            cosines = self.cosines(torch.stack([self._picture(one) for one in alike]), [text for text, _ in alike])
            found.update(zip(alike, self.factor * cosines, strict=True))
        return torch.stack([found[one] for one in references])

    def _embedded(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, D) of length 1, with gradients, of pictures of any size."""
        sizes = {picture.shape for picture in pictures}
        if len(sizes) == 1:
            return F.normalize(self.clip.encode_images(torch.stack(list(pictures)).to(self.device)), dim=-1)
        return torch.cat([self._embedded([picture]) for picture in pictures])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tuned blocks with their optimizer and the counter."""
        state = training_state(dict(self.blocks.named_parameters()), self.optimizer)
        return {**state, "counters": torch.tensor([self.taken, self.beaten])}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_dict` gave."""
        load_training_state(state, dict(self.blocks.named_parameters()), self.optimizer)
        self.taken, self.beaten = (int(value) for value in state["counters"])


def _vision_blocks(clip: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the image encoder, of transformers' or open_clip's CLIP."""
    model: Any = clip.model
    vision = model.vision_model.encoder.layers if hasattr(model, "vision_model") else model.visual.transformer.resblocks
    return list(vision)
