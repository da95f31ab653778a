"""CLIP models (Radford et al., 2021) from transformers or open_clip; rewards with the same model share it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import open_clip
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from rewards.backbones.preprocessing import Preprocessing
from rewards.backbones.weights import located, shared, whole
from rewards.base import RewardError, Rows, at_least_one, reason
from rewards.devices import chosen_device
from rewards.frames import FrameReward
from rewards.media import as_levels


class TransformersClip(nn.Module):
    """A `CLIPModel` from a folder or hub id; `processor` has its tokenizer and image processor (default: `model`)."""

    def __init__(self, model: str, processor: str | None):
        super().__init__()
        self.model = whole(CLIPModel.from_pretrained, model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        self.processor = AutoImageProcessor.from_pretrained(processor or model)
        self.length = self.model.config.text_config.max_position_embeddings

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D), not normalised, of images (B, 3, H, W) in [0, 1]."""
        pixels = self.processor(images=as_levels(images), return_tensors="pt", device=images.device)["pixel_values"]
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (B, D), not normalised, of B texts, each cut to the model's maximum length."""
        limits = {"padding": "max_length", "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(list(texts), **limits, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


class OpenClip(nn.Module):
    """An open_clip model: a folder, an "hf-hub:..." id, or an architecture with a `pretrained` tag or weights file."""

    def __init__(self, model: str, pretrained: str | None, resize_mode: str | None):
        super().__init__()
        name = f"local-dir:{model}" if Path(model).is_dir() else model
        options = {"force_preprocess_cfg": {"resize_mode": resize_mode}} if resize_mode else {}
        self.model = open_clip.create_model(name, pretrained, require_pretrained=True, **options)
        self.tokenizer = open_clip.get_tokenizer(name)
        config = self.model.visual.preprocess_cfg
        size = config["size"] if isinstance(config["size"], tuple | list) else (config["size"],) * 2
        fill = [config["fill_color"]] * 3  # one level for the three channels
        steps = config["mean"], config["std"], config["interpolation"], config["resize_mode"]
        self.preprocessing = Preprocessing(tuple(size), tuple(size), *steps, fill)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D), not normalised, of images (B, 3, H, W) in [0, 1]."""
        return self.model.encode_image(self.preprocessing(images))

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (B, D), not normalised, of B texts, each cut to the model's maximum length."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.model.logit_scale.device))


Clip = TransformersClip | OpenClip


def load_clip(model: str, reward: str, device: str | torch.device, **options: str | None) -> Clip:
    """A frozen CLIP model in float32; RewardError that names `reward` if it cannot be loaded.

    open_clip loads the model if the option `pretrained` is given, the name begins with "hf-hub:" or the folder is in
    open_clip's format; otherwise transformers does. Options: `pretrained` and `resize_mode` for open_clip, `processor`
    for transformers.
    """
    found = located(model)
    pretrained, processor = options.get("pretrained"), options.get("processor")
    try:
        if pretrained or found.startswith("hf-hub:") or (Path(found) / "open_clip_config.json").is_file():
            clip: Clip = OpenClip(found, pretrained, options.get("resize_mode"))
        else:
            clip = TransformersClip(found, processor and located(processor))
    except Exception as error:
        raise RewardError(f"reward {reward!r}: CLIP model {model!r} cannot be loaded: {reason(error)}") from error
    return clip.to(device).eval().requires_grad_(False)


class ClipFeatures:
    """Embeddings of length 1 from a CLIP model, computed for `batch_size` images or texts at once.

    own: True loads a model of its own, for a user that changes the weights; False shares the model.
    """

    def __init__(
        self,
        model: str,
        reward: str,
        batch_size: int,
        device: str | torch.device | None,
        own: bool = False,
        **options: str | None,
    ):
        at_least_one(reward, batch_size=batch_size)
        self.device = chosen_device(device)
        load = partial(load_clip, model, reward, self.device, **options)
        key = ("clip", located(model), str(self.device), *sorted(item for item in options.items() if item[1]))
        self.clip: Clip = load() if own else shared(load, *key)
        self.batch_size = batch_size

    @torch.no_grad()
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) of images (B, 3, H, W) in [0, 1]."""
        batches = [self.clip.encode_images(part.to(self.device)) for part in images.split(self.batch_size)]
        return F.normalize(torch.cat(batches).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings (B, D) of B texts; equal texts are encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        unique, size = list(rows), self.batch_size
        batches = [self.clip.encode_texts(unique[i : i + size]) for i in range(0, len(unique), size)]
        return F.normalize(torch.cat(batches).float(), dim=-1)[[rows[text] for text in texts]]


class ClipReward(ClipFeatures, FrameReward):
    """A reward on a CLIP model: `factor` times the cosine of image and prompt, unless a class scores otherwise.

    model: a transformers folder or hub id, an open_clip folder or "hf-hub:..." id, or, with `pretrained` (a tag or a
        weights file), an open_clip architecture; "toyworld/judges/clip" is the embedded world's.
    batch_size: images or texts that the model takes at once; lower it if the device's memory is too small.
    frames: frames of a video that are judged, the middles of equal spans; the score is their mean.
    device: where the model runs (default: the accelerator, if there is one).

    An image that is not square is cropped to its middle if the model's own preprocessing crops, as OpenAI's and most
    others do; the published scores were computed in this way.
    """

    changes_weights: ClassVar[bool] = False
    factor = 1.0

    def __init__(self, model: str, batch_size: int, frames: int, device: str | None, **options: str | None):
        at_least_one(self.name, frames=frames)
        super().__init__(model, self.name, batch_size, device, self.changes_weights, **options)
        self.frames = frames

    def likeness(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """`factor` times the cosine (N,) of each image and its prompt, kept within the range."""
        cosines = (self.image_features(images) * self.text_features(prompts)).sum(-1)
        return (self.factor * cosines).clamp(*self.range)

    def of_images(self, images: torch.Tensor, prompts: Sequence[str], metadata: Rows) -> torch.Tensor:
        return self.likeness(images, prompts)
