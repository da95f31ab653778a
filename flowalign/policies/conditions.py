"""Text conditions on disk: every prompt is encoded once, and the text encoders are then released, or never loaded.

A folder holds a subfolder for each model (its text encoders' files, its adapter, length and dtype), and in it a
safetensors file for each prompt, written under another name and renamed. What is there is read back bit for bit, by
later runs and by all processes of one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.disk.files import replace_text
from flowalign.policies.adapters import adapter_files
from flowalign.policies.base import Condition, Policy, TextPolicy, forward_dtype
from flowalign.policies.folders import model_folder
from flowalign.policies.loading import load_policy

AT_ONCE = 16  # prompts that are encoded together
_NO_TEXT = ("transformer", "vae", "unet")  # the parts of a pipeline that do not change what a prompt is encoded to


class CachedConditions:
    """The conditions of a model's prompts in a folder of its own, encoded in `dtype`, read to `device`."""

    def __init__(self, folder: Path, model: Model, device: torch.device, dtype: torch.dtype):
        about = identity(model, dtype)
        self.folder = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self.device = device
        self._about = about

    def path(self, prompt: str) -> Path:
        """Where a prompt's condition is, or would be."""
        return self.folder / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """The prompts that have yet to be encoded."""
        return [prompt for prompt in prompts if not self.path(prompt).is_file()]

    def fill(self, policy: TextPolicy, prompts: Sequence[str], share: slice = slice(None)) -> None:
        """Encode a share of the batches of `prompts` with the policy, where any prompt of a batch is missing.

        Which prompts are encoded together does not depend on the share. Raises UserError when the disk is full.
        """
        batches = [prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE)]
        for batch in batches[share]:
            if wanted := set(self.missing(batch)):
                condition = policy.encode_prompts(batch)
                for row, prompt in enumerate(batch):
                    if prompt in wanted:
                        self._write(prompt, condition[row : row + 1])

    def _write(self, prompt: str, condition: Condition) -> None:
        path = self.path(prompt)
        partial = path.with_name(f".partial_{os.getpid()}_{path.name}")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in condition.tensors.items()}
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_text(self.folder / "model.json", json.dumps(self._about, indent=2) + "\n")
            save_file(tensors, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            if partial.is_file():
                partial.unlink()
            raise UserError(f"model.cache_conditions: cannot write to {self.folder}: {error}") from error

    def read(self, prompts: Sequence[str]) -> Condition:
        """The kept conditions, one row a prompt, on the cache's device.

        Raises UserError for a prompt that was not encoded and for a damaged file.
        """
        for prompt in self.missing(prompts):
            raise UserError(
                f"model.cache_conditions: {prompt!r} was not encoded before the text encoders were released"
            )
        known = {prompt: self._read_one(self.path(prompt)) for prompt in dict.fromkeys(prompts)}
        return Condition.cat([known[prompt] for prompt in prompts])

    def _read_one(self, path: Path) -> Condition:
        try:
            tensors = load_file(path)  # then moved: safetensors knows no device cpu:0, as of one process of several
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.cache_conditions: {path} is damaged ({error}); remove it to encode anew") from error
        return Condition({name: tensor.to(self.device) for name, tensor in tensors.items()})


def cached_policy(
    model: Model,
    prompts: Sequence[str],
    device: torch.device | str,
    seed: int,
    accelerator: Accelerator | None = None,
    *,
    given: Policy | None = None,
    whole: bool = True,
) -> Policy:
    """The policy of a model's settings, ready for these prompts as `cache_conditions` makes it; or the one `given`.

    Its text encoders are loaded only if a prompt has yet to be encoded, or an adapter may have weights for them. Each
    process looks for itself: what one finds complete stays so, whatever the others still write. Without `whole` as
    `load_policy` says. Raises UserError as it and `cache_conditions` do, and for a policy that a script gave: what it
    encodes need not be what the settings name.
    """
    if given is not None:
        if model.cache_conditions is not None:
            raise UserError(
                "model.cache_conditions keeps what the recipe's own model encodes; for a policy of a script's own "
                "leave it out, or call flowalign.policies.conditions.cache_conditions"
            )
        return given
    needed = True
    if model.cache_conditions is not None and model.adapter is None:
        device = torch.device(device)
        cache = CachedConditions(Path(model.cache_conditions), model, device, forward_dtype(model.dtype, device))
        needed = bool(cache.missing(["", *prompts]))
    policy = load_policy(model, device, seed, whole=whole, text_encoders=needed)
    cache_conditions(policy, model, prompts, accelerator)
    return policy


def cache_conditions(
    policy: TextPolicy, model: Model, prompts: Iterable[str], accelerator: Accelerator | None = None
) -> None:
    """With `model.cache_conditions`, encode the prompts and the empty one, then release the policy's text encoders.

    From then on `policy.encode` reads what was kept. Several processes encode a share each and wait for one another;
    where they share no disk each encodes what it still lacks. Raises UserError when the folder cannot be written to.
    """
    if model.cache_conditions is None:
        return
    cache = CachedConditions(Path(model.cache_conditions), model, policy.device, policy.dtype)
    texts = list(dict.fromkeys(["", *prompts]))
    if accelerator is not None and accelerator.num_processes > 1:
        cache.fill(policy, texts, slice(accelerator.process_index, None, accelerator.num_processes))
        accelerator.wait_for_everyone()
    cache.fill(policy, texts)
    policy.encode_prompts = cache.read  # type: ignore[method-assign]  # one way through: who asks the policy is answered
    policy.free_text_encoders()


def identity(model: Model, dtype: torch.dtype) -> dict[str, object]:
    """What decides a model's conditions: names, sizes and times of its text files and of its adapter's; length; dtype.

    Times, since a checksum of the published encoders' 10 GB would take longer than to encode a thousand prompts.
    """
    folder = model_folder(model.path) or Path(model.path)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in found if path.relative_to(folder).parts[0] not in _NO_TEXT]
    adapter = adapter_files(model.adapter) if model.adapter else []
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *adapter)]
    return {"path": model.path, "files": seen, "max_sequence_length": model.max_sequence_length, "dtype": str(dtype)}
