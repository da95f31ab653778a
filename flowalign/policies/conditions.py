"""Conditions on disk: every row's are encoded once, and the text encoders are then released, or never loaded.

A folder holds a subfolder for each model (its text encoders' files, its adapter, length and dtype), and in it a
safetensors file for each condition, named by the content of the inputs that it was made of. What is there is read back
bit for bit, by later runs and by all processes of one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from flowalign.config import Model
from flowalign.config.base import UserError
from flowalign.disk.files import checksum, checksum_of, make_folder, replace_json
from flowalign.disk.tensors import save_tensors
from flowalign.policies.adapters import adapter_files
from flowalign.policies.base import Condition, Conditioning, Policy, forward_dtype
from flowalign.policies.folders import model_folder
from flowalign.policies.loading import find_family, load_policy, sizes_of
from flowalign.policies.request import Row

AT_ONCE = 16  # rows that are encoded together
_NO_TEXT = ("transformer", "vae", "unet")  # the parts of a pipeline that do not change what a prompt is encoded to


class CachedConditions:
    """The conditions of a model's rows in a folder of its own, encoded in `dtype`, read to `device`.

    `family` is the policy's class, which says what of a row a condition depends on.
    """

    def __init__(self, folder: Path, model: Model, family: type[Policy], device: torch.device, dtype: torch.dtype):
        self._about = identity(model, family, dtype)
        self.folder = folder / checksum_of(self._about)[:16]
        self.device = device
        self._family = family
        self._contents: dict[str, str] = {}  # of files, by path

    def paths(self, row: Row) -> tuple[Path, Path]:
        """Where the conditions of both sides of guidance are, or would be: the positive, the negative.

        The negative one is that of all rows which differ in their prompts alone. Raises UserError where an input is
        missing.
        """
        inputs = {name: self._input(row, name) for name in self._family.inputs}
        inputs |= {name: self._content(row, name) for name in self._family.input_files}
        rest = {name: value for name, value in inputs.items() if name != "prompt"}
        positive, negative = (
            self.folder / f"{checksum_of([side, given], sort_keys=True)[:32]}.safetensors"
            for side, given in (("positive", inputs), ("negative", rest))
        )
        return positive, negative

    def _input(self, row: Row, name: str) -> Any:
        if name not in row.about:
            raise UserError(f"prompt {row.prompt!r} has no {name}, which this model needs of every prompt")
        return row.about[name]

    def _content(self, row: Row, name: str) -> str:
        file = str(self._input(row, name))
        if file not in self._contents:
            try:
                self._contents[file] = checksum(Path(file))
            except OSError as error:
                raise UserError(f"the {name} of prompt {row.prompt!r} cannot be read: {error}") from error
        return self._contents[file]

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """The rows of which a side has yet to be encoded."""
        return [row for row in rows if not all(path.is_file() for path in self.paths(row))]

    def fill(self, policy: Policy, rows: Sequence[Row], share: slice = slice(None)) -> None:
        """Encode a share of the batches of `rows` with the policy, where anything of a batch is missing.

        Which rows are encoded together does not depend on the share. Raises UserError when the disk is full.
        """
        distinct = list({self.paths(row): row for row in rows}.values())
        batches = [distinct[start : start + AT_ONCE] for start in range(0, len(distinct), AT_ONCE)]
        for batch in filter(self.missing, batches[share]):
            conditioning = policy.encode(batch)
            for place, row in enumerate(batch):
                for path, side in zip(self.paths(row), (conditioning.positive, conditioning.negative), strict=True):
                    if not path.is_file():
                        self._write(path, side[place : place + 1])

    def _write(self, path: Path, condition: Condition) -> None:
        try:
            if not self.folder.is_dir():
                replace_json(make_folder(self.folder) / "model.json", self._about)
            tensors = {name: tensor.detach().cpu() for name, tensor in condition.tensors.items()}
            save_tensors(path, tensors, contended=True)  # by other runs too
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.cache_conditions: cannot write to {self.folder}: {error}") from error

    def read(self, rows: Sequence[Row]) -> Conditioning:
        """The kept conditions of both sides, on the cache's device.

        Raises UserError for a row that was not encoded and for a damaged file.
        """
        for row in self.missing(rows):
            raise UserError(
                f"model.cache_conditions: {row.prompt!r} was not encoded before the text encoders were released"
            )
        positive, negative = zip(*map(self.paths, rows), strict=True)
        return Conditioning(self._read_all(positive), self._read_all(negative))

    def _read_all(self, paths: Sequence[Path]) -> Condition:
        known = {path: self._read_one(path) for path in dict.fromkeys(paths)}
        if len(known) == 1:
            return known[paths[0]].expand(len(paths))
        return Condition.cat([known[path] for path in paths])

    def _read_one(self, path: Path) -> Condition:
        try:
            tensors = load_file(path)  # then moved: safetensors knows no device cpu:0, as of one process of several
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.cache_conditions: {path} is damaged ({error}); remove it to encode anew") from error
        return Condition({name: tensor.to(self.device) for name, tensor in tensors.items()})


def cached_policy(
    model: Model,
    rows: Sequence[Row],
    device: torch.device | str,
    seed: int,
    accelerator: Accelerator | None = None,
    *,
    given: Policy | None = None,
    whole: bool = True,
) -> Policy:
    """The policy of a model's settings, ready for these rows as `cache_conditions` makes it; or the one `given`.

    Its text encoders are loaded only if a row has yet to be encoded, or an adapter may have weights for them. Each
    process looks for itself: what one finds complete stays so, whatever the others still write. Without `whole` as
    `load_policy` says. Raises UserError as it and `cache_conditions` do, and for settings that a script's own policy
    does not follow: what it encodes need not be what they name.
    """
    if given is not None:
        if model.cache_conditions is not None:
            raise UserError(
                "model.cache_conditions keeps what the recipe's own model encodes; for a policy of a script's own "
                "leave it out, or call flowalign.policies.conditions.cache_conditions"
            )
        for name in ("height", "width"):
            asked, made = getattr(model, name), getattr(given.request, name)
            if asked not in (None, made):
                raise UserError(f"model.{name} {asked}: the policy that the script gives makes {made}; leave it out")
        return given
    needed = True
    if model.cache_conditions is not None and model.adapter is None:
        device = torch.device(device)
        family, _ = find_family(model)
        dtype = forward_dtype(model.dtype, device)
        needed = bool(CachedConditions(Path(model.cache_conditions), model, family, device, dtype).missing(rows))
    policy = load_policy(model, device, seed, whole=whole, text_encoders=needed)
    cache_conditions(policy, model, rows, accelerator)
    return policy


def cache_conditions(policy: Policy, model: Model, rows: Sequence[Row], accelerator: Accelerator | None = None) -> None:
    """With `model.cache_conditions`, encode the rows, both sides of guidance, then release the policy's text encoders.

    From then on `policy.encode` reads what was kept. Several processes encode a share each and wait for one another;
    where they share no disk each encodes what it still lacks. Raises UserError when the folder cannot be written to.
    """
    if model.cache_conditions is None:
        return
    cache = CachedConditions(Path(model.cache_conditions), model, type(policy), policy.device, policy.dtype)
    if accelerator is not None and accelerator.num_processes > 1:
        cache.fill(policy, rows, slice(accelerator.process_index, None, accelerator.num_processes))
        accelerator.wait_for_everyone()
    cache.fill(policy, rows)
    policy.encode = cache.read  # type: ignore[method-assign]  # one way through: who asks the policy is answered
    policy.free_text_encoders()


def identity(model: Model, family: type[Policy], dtype: torch.dtype) -> dict[str, object]:
    """What decides a model's conditions: names, sizes and times of its text files and of its adapter's; length; dtype.

    Where files are among a row's inputs, the autoencoder's files and the size of what is drawn decide too. Times, since
    a checksum of the published encoders' 10 GB would take longer than to encode a thousand prompts.
    """
    folder = model_folder(model.path) or Path(model.path)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    apart = [part for part in _NO_TEXT if part != "vae" or not family.input_files]
    files = [path for path in found if path.relative_to(folder).parts[0] not in apart]
    adapter = adapter_files(model.adapter) if model.adapter else []
    seen = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *adapter)]
    request, length = sizes_of(model)
    about = {"path": model.path, "files": seen, "max_sequence_length": length, "dtype": str(dtype)}
    return about | ({"request": asdict(request)} if family.input_files else {})
