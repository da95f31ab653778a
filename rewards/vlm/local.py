"""A local vision-language model as a judge, through transformers' processor and chat template."""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from rewards.backbones.weights import located, shared, whole
from rewards.base import grouped, reason
from rewards.devices import chosen_device
from rewards.vlm.base import REASONING, VLM, Pictures, Unfinished, Unparsable, VLMError, at_least, plain, switches

# Model types that were measured to judge a padded question as they judge it alone. With any other type, questions share
# a batch only if they have one length and their images have one size, so that nothing is padded.
PADDED = {"aya_vision", "gemma3", "glm4v", "idefics2", "idefics3", "internvl", "lfm2_vl", "llava", "llava_next"}
PADDED |= {"llava_onevision", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"}
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # one value for each token
SWITCHES = ("enable_thinking", "thinking")  # names of the switch for reasoning in chat templates


class LocalVLM(VLM):
    """A chat model that transformers can load, such as Qwen2.5-VL, Qwen3-VL or InternVL.

    model: folder or hub id. device: where the model runs (default: the accelerator, if there is one).
    dtype: type of the weights, such as "bfloat16" or "float32"; "auto" takes the checkpoint's.
    batch_size: questions at once; lower it if the device's memory is too small. With a model type that is not in
        `PADDED`, only questions of one length about images of one size share a batch.
    thinking: whether the model reasons first, if its chat template has a switch for it; None leaves it to the template.
    template: further values for the chat template.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        thinking: bool | None = None,
        template: Mapping[str, Any] | None = None,
    ):
        at_least("batch_size", batch_size, 1)
        given = switches(thinking, "template", template)
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise VLMError(f"dtype must be 'auto' or a type of torch such as 'bfloat16', not {dtype!r}")
        try:
            self.processor = AutoProcessor.from_pretrained(located(model))
            what = (located(model), chosen_device(device), dtype)
            self.model = shared(lambda: _network(*what), "chat", *what)
        except Exception as error:
            raise VLMError(f"the model {model!r} cannot be loaded: {reason(error)}") from error
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or not getattr(self.processor, "chat_template", None):
            raise VLMError(f"the model {model!r} has no processor of images with a chat template")
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise VLMError(f"the model {model!r} has an encoder and a decoder; a judge must have a decoder only")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.template = {**given, **self._switch(model, thinking)}
        for name in self.template:
            if name not in str(self.processor.chat_template):
                raise VLMError(f"the chat template of the model {model!r} does not know {name!r}")
        self.batch_size = batch_size
        self.path = model
        self.pads = self.model.config.model_type in PADDED
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _switch(self, model: str, thinking: bool | None) -> dict[str, bool]:
        """The chat template's switch for reasoning, set to `thinking`; empty for None."""
        if thinking is None:
            return {}
        for name in SWITCHES:
            if re.search(rf"\b{name}\b", str(self.processor.chat_template)):
                return {name: thinking}
        names = " or ".join(map(repr, SWITCHES))
        raise VLMError(f"thinking: the chat template of the model {model!r} has no switch {names}; leave it out")

    @torch.no_grad()
    def answer(self, images: Pictures, texts: Sequence[str], max_tokens: int) -> list[str]:
        chats = self._chats(images, texts)
        answers: dict[int, str] = {}
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor(self.processor.tokenizer.eos_token_id if ends is None else ends).flatten()
        for rows in self._batches(images, chats):
            inputs = self._inputs([images[row] for row in rows], [chats[row] for row in rows], "left")
            width = inputs["input_ids"].shape[1]
            pad = self.processor.tokenizer.pad_token_id
            tokens = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=pad)
            for row, new in zip(rows, tokens[:, width:].cpu(), strict=True):
                # The chat template itself may open the reasoning.
                said = (self._reasons(chats[row]) or "") + self._text(new)
                answers[row] = said if torch.isin(new, ends).any() else Unfinished(said)
        return [answers[row] for row in range(len(texts))]

    @torch.no_grad()
    def choice_log_probs(self, images: Pictures, texts: Sequence[str], choices: Sequence[str]) -> torch.Tensor:
        tokens = [self._tokens.get(plain(choice)) for choice in choices]
        if None in tokens:
            raise VLMError(f"the model {self.path!r} has no token for the answer {choices[tokens.index(None)]!r}")
        chats = self._chats(images, texts)
        self._refuse_reasoning(chats)
        found = torch.empty(len(texts), len(choices), device=self.model.device)
        problems: dict[int, str] = {}
        for rows in self._batches(images, chats):
            inputs = self._inputs([images[row] for row in rows], [chats[row] for row in rows], "right")
            last = inputs["attention_mask"].sum(1) - 1
            first = int(last.min())
            logits = self._logits(inputs, first)[torch.arange(len(last), device=last.device), last - first]
            log_probs = logits.float().log_softmax(-1)
            found[rows] = torch.stack([log_probs[:, ids].logsumexp(1) for ids in tokens], 1)
            for row, likeliest in zip(rows, log_probs.argmax(-1).tolist(), strict=True):
                said = self.processor.tokenizer.decode([likeliest])
                if REASONING.fullmatch(said.strip()):
                    problems[row] = f"the model begins its answer with {said!r}, its reasoning; try `thinking: false`"
                    found[row] = torch.nan
        if problems:
            raise Unparsable(problems, found)
        return found

    @torch.no_grad()
    def continuation_log_prob(self, images: Pictures, question: str, continuations: Sequence[str]) -> torch.Tensor:
        tails = [self.processor.tokenizer(text, add_special_tokens=False).input_ids for text in continuations]
        if [] in tails:
            raise VLMError("a text without tokens has no probability", tails.index([]))
        chats = self._chats(images, [question] * len(tails))
        self._refuse_reasoning(chats)
        found = torch.empty(len(tails), device=self.model.device)
        for rows in self._batches(images, chats, tails):
            inputs = self._inputs([images[row] for row in rows], [chats[row] for row in rows], "right")
            starts = inputs["attention_mask"].sum(1).tolist()
            self._append(inputs, starts, [tails[row] for row in rows])
            first = min(starts) - 1
            logits = self._logits(inputs, first)
            for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
                steps = logits[place, start - 1 - first :][: len(tails[row])].float()
                found[row] = -F.cross_entropy(steps, torch.tensor(tails[row], device=steps.device))
        return found

    def _chats(self, images: Pictures, texts: Sequence[str]) -> list[str]:
        contents = [
            [*({"type": "image"} for _ in row), {"type": "text", "text": text}]
            for row, text in zip(images, texts, strict=True)
        ]
        messages = [[{"role": "user", "content": content}] for content in contents]
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self.template)

    def _reasons(self, chat: str) -> str | None:
        """The mark with which the chat template opens the answer's reasoning, if it does."""
        marks = list(REASONING.finditer(chat))
        return marks[-1][0] if marks and not marks[-1][1] and not chat[marks[-1].end() :].strip() else None

    def _refuse_reasoning(self, chats: Sequence[str]) -> None:
        for row, chat in enumerate(chats):
            if mark := self._reasons(chat):
                why = f"begins every answer with {mark}, so that its first token is no answer; try `thinking: false`"
                raise VLMError(f"the chat template of the model {self.path!r} {why}", row)

    def _text(self, tokens: torch.Tensor) -> str:
        """The text of the tokens without special tokens; reasoning marks stay, even where they are special tokens."""
        tokenizer = self.processor.tokenizer
        dropped = {i for i in tokenizer.all_special_ids if not REASONING.fullmatch(tokenizer.decode([i]).strip())}
        return tokenizer.decode([token for token in tokens.tolist() if token not in dropped])

    def _batches(
        self, images: Pictures, chats: Sequence[str], tails: Sequence[Sequence[int]] | None = None
    ) -> list[list[int]]:
        """The rows of each batch: any questions, or only those of one size if padding might change the answers."""
        alike: dict[Any, list[int]] = {}
        for row, chat in enumerate(chats):
            key: Any = None
            if not self.pads:
                sizes = [image.size for image in images[row]]
                key = (*sizes, len(self.processor.tokenizer(chat).input_ids), len(tails[row]) if tails else 0)
            alike.setdefault(key, []).append(row)
        count = self.batch_size
        return [rows[start : start + count] for rows in alike.values() for start in range(0, len(rows), count)]

    def _inputs(self, images: Pictures, chats: Sequence[str], side: str) -> Any:
        """The inputs of a forward pass; `generate` needs "left" padding, and "right" padding keeps all positions."""
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = side
        inputs = self.processor(
            text=list(chats),
            images=[list(row) for row in images],
            return_tensors="pt",
            add_special_tokens=not (tokenizer.bos_token and chats[0].startswith(tokenizer.bos_token)),
            # Some processors pad on a side of their own, whatever the tokenizer's is.
            **({"padding": True, "padding_side": side} if len(chats) > 1 else {}),
        )
        steps = inputs["attention_mask"].diff(dim=1)
        if (steps < 0 if side == "left" else steps > 0).any() or not (self.pads or inputs["attention_mask"].all()):
            raise VLMError(f"the processor of {self.path!r} does not pad on the {side}; set batch_size to 1")
        return inputs.to(self.model.device, self.model.dtype)

    def _append(self, inputs: Any, starts: list[int], tails: list[list[int]]) -> None:
        """Writes each row's tail after the row's last token, in place."""
        width = inputs["input_ids"].shape[1]
        more = max(start + len(tail) for start, tail in zip(starts, tails, strict=True)) - width
        for key in TEXT_INPUTS:
            if key in inputs:  # token types: 0 is text
                fill = self.processor.tokenizer.pad_token_id if key == "input_ids" else 0
                inputs[key] = F.pad(inputs[key], (0, more), value=fill)
        if "cross_attention_mask" in inputs:  # Mllama's: a tail sees the images that the question's last token sees
            seen = inputs["cross_attention_mask"]
            inputs["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, more, *seen.shape[2:])], 1)
        for row, (start, tail) in enumerate(zip(starts, tails, strict=True)):
            inputs["input_ids"][row, start : start + len(tail)] = torch.tensor(tail)
            inputs["attention_mask"][row, start : start + len(tail)] = 1

    def _logits(self, inputs: Any, first: int) -> torch.Tensor:
        """Logits (N, positions from `first` on, vocabulary); a model that can skips the other positions."""
        wanted = inputs["input_ids"].shape[1] - first
        options = {"logits_to_keep": wanted} if self.keeps_logits else {}
        return self.model(**inputs, **options).logits[:, -wanted:]

    @functools.cached_property
    def _tokens(self) -> dict[str, list[int]]:
        """The vocabulary's tokens by their text in lower case, without the spaces around it."""
        tokenizer = self.processor.tokenizer
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        return grouped((plain(text), index) for index, text in enumerate(texts))


def _network(model: str, device: torch.device, dtype: str) -> Any:
    """The frozen model on its device."""
    network = whole(AutoModelForImageTextToText.from_pretrained, model, dtype=dtype)
    return network.to(device).eval().requires_grad_(False)
