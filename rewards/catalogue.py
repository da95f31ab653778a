"""The names of the built-in and installed rewards, and one line about each; this module imports no reward."""

import ast
import importlib.util
import inspect
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rewards.errors import RewardError, nearest

BUILT_IN = {
    "adversarial_dino": "rewards.adversarial_dino:AdversarialDINO",
    "adversarial_pickscore": "rewards.adversarial_pickscore:AdversarialPickScore",
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "artifact": "rewards.artifact:Artifact",
    "artifact_vlm": "rewards.artifact_vlm:ArtifactVLM",
    "clipscore": "rewards.clipscore:CLIPScore",
    "colorfulness": "rewards.colorfulness:Colorfulness",
    "compressibility": "rewards.compressibility:Compressibility",
    "geneval": "rewards.geneval:GenEval",
    "hpsv2": "rewards.hpsv2:HPSv2",
    "imagereward": "rewards.imagereward:ImageReward",
    "ocr": "rewards.ocr:OCR",
    "pairwise": "rewards.pairwise:Pairwise",
    "pickscore": "rewards.pickscore:PickScore",
    "prompt_echo": "rewards.prompt_echo:PromptEcho",
    "rubric": "rewards.rubric:Rubric",
    "similarity": "rewards.similarity:Similarity",
    "yes_no": "rewards.yes_no:YesNo",
}
ENTRY_POINT_GROUP = "flowalign.rewards"
# Modules that a recipe may still name as they were called earlier.
_MOVED = {
    "rewards.clip_colors": "rewards.detectors.colors",
    "rewards.mask2former": "rewards.detectors.mask2former",
    "rewards.ocr_engine": "rewards.detectors.ocr_engine",
    "rewards.remote": "rewards.http.remote",
    "rewards.vlm_endpoint": "rewards.vlm.endpoint",
    "rewards.vlm_local": "rewards.vlm.local",
}


def available() -> list[str]:
    """The names of all built-in and installed rewards, sorted."""
    return sorted({*BUILT_IN, *installed()})


def check_name(name_or_path: str) -> None:
    """Raises RewardError if `name_or_path` cannot name a reward; the reward itself is not imported."""
    source, colon, _ = name_or_path.rpartition(":")
    if name_or_path in BUILT_IN or name_or_path.startswith(("http://", "https://")):
        return
    if colon:
        if source.endswith(".py") and not Path(source).expanduser().is_file():
            raise RewardError(f"there is no file {source}")
        return
    if name_or_path.endswith(".py"):
        raise RewardError(f"{name_or_path!r} names a file; add the reward inside it, as in '{name_or_path}:Name'")
    known = available()
    if name_or_path not in known:
        raise RewardError(
            f"there is no reward {name_or_path!r}; did you mean {nearest(name_or_path, known)!r}? "
            f"(known: {', '.join(known)}; or 'file.py:Name', 'package.module:Name')"
        )


def module_named(source: str) -> str:
    """The present name of the module `source`, which may have moved."""
    return _MOVED.get(source, source)


def describe(name: str) -> str:
    """The first paragraph of a reward's docstring, on one line; a built-in reward is not imported for it."""
    if name in BUILT_IN:
        spec = importlib.util.find_spec(BUILT_IN[name].partition(":")[0])
        assert spec is not None and spec.origin is not None
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    else:
        text = inspect.getdoc(installed()[name].load()) or ""
    return " ".join(text.partition("\n\n")[0].split())


def installed() -> dict[str, EntryPoint]:
    """The rewards that installed packages add, by name."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
