"""PickScore, tuned during the run so that reference images keep scoring higher than generated ones.

Source: Adv-GRPO, "The Image as Its Own Reward" (2511.20256), and its released code. When the generated images of a step
score higher on average than the references of their prompts, PickScore's last vision blocks are trained to prefer the
reference of each pair: loss = -log(e^s(reference) / (e^s(reference) + e^s(generated))), s = exp(logit scale) cos. What
differs from the code: the step's rollouts still train the policy; Adam trains the blocks in float32, since steps of
5e-6 round to nothing in bfloat16.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from rewards.base import RewardError, Rows, TrainableReward, at_least_one, grouped
from rewards.frames import chosen_frames
from rewards.learning import counted, descend, load_training_state, training_state
from rewards.media import images_by_prompt, read_image
from rewards.pickscore import MODEL, PickScore

COLLAPSED_SPREAD = 1e-4  # standard deviation of cosines
PATIENCE = 10  # lost training steps in a row before the alarm is set

Reference = tuple[str, int]  # a prompt, and the number of one of its reference images


class AdversarialPickScore(PickScore, TrainableReward):
    """PickScore with vision blocks that learn (see the module).

    references: .json file {prompt: [image, ...]}; the reward applies to the prompts in it.
    layers: number of last vision blocks that are tuned. updates: tuning steps after a training step that the references
        lost. batch: pairs in one tuning step. learning_rate: of the tuned blocks. Raise these where the alarm says
        overrun; lower the learning rate where it says collapsed.
    seed: draws the pairs. model, processor, divisor, batch_size, frames and device are `PickScore`'s.
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
        files = images_by_prompt(references, self.name, "references")
        super().__init__(model, processor, divisor, batch_size, frames, device)
        blocks = _vision_blocks(self.clip)
        if layers > len(blocks):
            raise RewardError(f"reward {self.name!r}: layers {layers} exceeds the model's {len(blocks)} vision blocks")
        self.blocks = nn.ModuleList(blocks[-layers:]).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.blocks.parameters(), lr=learning_rate)
        self.references = {prompt: [read_image(path) for path in paths] for prompt, paths in files.items()}
        self.updates, self.batch, self.seed = updates, batch, seed
        self.taken = 0
        self.beaten = 0  # training steps in a row in which the references lost

    def applies_to(self, row: Mapping[str, Any]) -> bool:
        """True for prompts with reference images."""
        return row["prompt"] in self.references

    def update(self, media: torch.Tensor, prompts: Sequence[str], metadata: Rows, step: int) -> dict[str, float]:
        """Tunes the blocks if the generated images beat the references; metrics: both means and, if tuned, the loss."""
        frames, count = chosen_frames(media, self.frames)
        texts = [prompt for prompt in prompts for _ in range(count)]
        pairs = [(text, place % len(self.references[text])) for place, text in enumerate(texts)]
        generated = self.likeness(frames, texts)
        reference = self._reference_scores(pairs)
        metrics = {"generated": generated.mean().item(), "reference": reference.mean().item()}
        self._watch(metrics, generated)
        if not self.beaten:
            return metrics
        order = torch.randperm(len(frames), generator=counted(self.seed, step)).tolist()
        scale = self.clip.model.logit_scale.exp()
        for turn in range(self.updates):
            start = turn * self.batch % len(order)
            chosen = order[start : start + self.batch]
            words = self.text_features([texts[i] for i in chosen])
            won = self._embedded([self._image(pairs[i]) for i in chosen])
            lost = self._embedded(list(frames[chosen]))
            loss = -F.logsigmoid(scale * ((won - lost) * words).sum(-1)).mean()
            descend(self.optimizer, loss)
            self.taken += 1
            metrics["loss"] = loss.item()
        metrics["updates"] = float(self.taken)
        return metrics

    def _watch(self, metrics: Mapping[str, float], generated: torch.Tensor) -> None:
        self.beaten = self.beaten + 1 if metrics["generated"] > metrics["reference"] else 0
        self.alarm = None
        if len(generated) > 1 and generated.std() < COLLAPSED_SPREAD * self.factor:
            self.alarm = "collapsed: it scores all generated images alike; use a smaller learning_rate"
        elif self.beaten >= PATIENCE:
            self.alarm = (
                f"overrun: generated images beat the references for {self.beaten} steps in a row although it is "
                "tuned; use more updates, more layers or a larger learning_rate"
            )

    def _image(self, reference: Reference) -> torch.Tensor:
        prompt, place = reference
        return self.references[prompt][place]

    def _reference_scores(self, references: Sequence[Reference]) -> torch.Tensor:
        """Scores (B,); each distinct reference is scored once, and references of one size together."""
        sizes = grouped((self._image(one).shape, one) for one in dict.fromkeys(references))
        found: dict[Reference, torch.Tensor] = {}
        for alike in sizes.values():
            scores = self.likeness(torch.stack([self._image(one) for one in alike]), [text for text, _ in alike])
            found.update(zip(alike, scores, strict=True))
        return torch.stack([found[one] for one in references])

    def _embedded(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeddings (B, D) of length 1, with gradients, of images of any size."""
        sizes = {image.shape for image in images}
        if len(sizes) == 1:
            return F.normalize(self.clip.encode_images(torch.stack(list(images)).to(self.device)), dim=-1)
        return torch.cat([self._embedded([image]) for image in images])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tuned blocks with their optimizer and the counters."""
        state = training_state(self.blocks, self.optimizer)
        return {**state, "counters": torch.tensor([self.taken, self.beaten])}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the state that `state_dict` returned."""
        load_training_state(state, self.blocks, self.optimizer)
        self.taken, self.beaten = (int(value) for value in state["counters"])


def _vision_blocks(clip: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the image encoder in transformers' or open_clip's CLIP."""
    model: Any = clip.model
    vision = model.vision_model.encoder.layers if hasattr(model, "vision_model") else model.visual.transformer.resblocks
    return list(vision)
