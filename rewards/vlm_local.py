"""A vision-language model of one's own as a judge, through transformers' processor and chat template."""

import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from rewards.base import reason
from rewards.vlm import VLM, Pictures, VLMError, at_least, plain
from rewards.weights import chosen_device, located


class LocalVLM(VLM):
    """A chat model that transformers can load, such as Qwen2.5-VL, Qwen3-VL or InternVL.

    model: folder or hub id. device: the accelerator if there is one. dtype: "bfloat16", "float32" ..., or "auto",
    the checkpoint's own. batch_size: questions at once.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str = "auto", batch_size: int = 8):
        at_least("batch_size", batch_size, 1)
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise VLMError(f"dtype must be 'auto' or a type of torch such as 'bfloat16', not {dtype!r}")
        try:
            self.processor = AutoProcessor.from_pretrained(located(model))
            self.model = _shared(located(model), chosen_device(device), dtype)
        except Exception as error:
            raise VLMError(f"the model {model!r} cannot be loaded: {reason(error)}") from error
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or not getattr(self.processor, "chat_template", None):
            raise VLMError(f"the model {model!r} has no processor of pictures with a chat template")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.batch_size = batch_size
        self.path = model
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @torch.no_grad()
    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        answers: list[str] = []
        for part in self._parts(len(texts)):
            inputs = self._inputs(images[part], texts[part], "left")
            width = inputs["input_ids"].shape[1]
            pad = self.processor.tokenizer.pad_token_id
            tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad)
            answers += self.processor.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return answers

    @torch.no_grad()
    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        tokens = [self._tokens.get(plain(choice)) for choice in choices]
        if None in tokens:
            raise VLMError(f"the model {self.path!r} has no token for the answer {choices[tokens.index(None)]!r}")
        found = []
        for part in self._parts(len(texts)):
            inputs = self._inputs(images[part], texts[part], "right")
            last = inputs["attention_mask"].sum(1) - 1
            first = int(last.min())
            logits = self._logits(inputs, first)[torch.arange(len(last), device=last.device), last - first]
            log_probs = logits.float().log_softmax(-1)
            found.append(torch.stack([log_probs[:, ids].logsumexp(1) for ids in tokens], 1))
        return torch.cat(found)

    @torch.no_grad()
    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        tails = [self.processor.tokenizer(text, add_special_tokens=False).input_ids for text in continuations]
        if [] in tails:
            raise VLMError("a text without tokens has no probability", tails.index([]))
        found = []
        for part in self._parts(len(tails)):
            inputs = self._inputs(images[part], [question] * len(tails[part]), "right")
            starts = inputs["attention_mask"].sum(1).tolist()
            self._append(inputs, starts, tails[part])
            first = min(starts) - 1
            logits = self._logits(inputs, first)
            for row, (start, tail) in enumerate(zip(starts, tails[part], strict=True)):
                place = start - 1 - first
                steps = logits[row, place : place + len(tail)].float()
                found.append(-F.cross_entropy(steps, torch.tensor(tail, device=steps.device)))
        return torch.stack(found)

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, start + self.batch_size) for start in range(0, count, self.batch_size)]

    def _inputs(self, images: Pictures, texts: Sequence[str], side: str) -> Any:
        """What the model's forward takes; "right" padding needs no care for positions, `generate` needs "left"."""
        contents = [
            [*({"type": "image"} for _ in row), {"type": "text", "text": text}]
            for row, text in zip(images, texts, strict=True)
        ]
        chats = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in contents], tokenize=False, add_generation_prompt=True
        )
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = side
        inputs = self.processor(
            text=chats,
            images=[list(row) for row in images],
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (tokenizer.bos_token and chats[0].startswith(tokenizer.bos_token)),
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _append(self, inputs: Any, starts: list[int], tails: list[list[int]]) -> None:
        """Write each row's tail behind its own last token, in place."""
        shape = inputs["input_ids"].shape
        more = max(start + len(tail) for start, tail in zip(starts, tails, strict=True)) - shape[1]
        for key, value in inputs.items():
            if value.shape == shape:  # input_ids, attention_mask and, by model, token types: 0 is text
                fill = self.processor.tokenizer.pad_token_id if key == "input_ids" else 0
                inputs[key] = F.pad(value, (0, more), value=fill)
        for row, (start, tail) in enumerate(zip(starts, tails, strict=True)):
            inputs["input_ids"][row, start : start + len(tail)] = torch.tensor(tail)
            inputs["attention_mask"][row, start : start + len(tail)] = 1

    def _logits(self, inputs: Any, first: int) -> torch.Tensor:
        """Logits (N, positions from `first` on, vocabulary); the others are never made where the model allows."""
        wanted = inputs["input_ids"].shape[1] - first
        options = {"logits_to_keep": wanted} if self.keeps_logits else {}
        return self.model(**inputs, **options).logits[:, -wanted:]

    @functools.cached_property
    def _tokens(self) -> dict[str, list[int]]:
        """The tokens of the vocabulary by what they read as, whatever their case and spaces."""
        tokenizer = self.processor.tokenizer
        tokens: dict[str, list[int]] = {}
        for index, text in enumerate(tokenizer.batch_decode([[index] for index in range(len(tokenizer))])):
            tokens.setdefault(plain(text), []).append(index)
        return tokens


_loaded: weakref.WeakValueDictionary[tuple[str, str, str], Any] = weakref.WeakValueDictionary()


def _shared(model: str, device: torch.device, dtype: str) -> Any:
    """The frozen model on its device, loaded once however many rewards ask for it, while one of them lives."""
    key = (model, str(device), dtype)
    network = _loaded.get(key)
    if network is None:
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
        _loaded[key] = network.requires_grad_(False)
    return network
