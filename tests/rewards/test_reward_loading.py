"""`rewards.load`: from a name, a file or a module to a reward."""

import subprocess
import sys

import pytest
import torch

import rewards
from rewards import RewardError
from rewards.base import import_object, nearest

MEDIA = torch.full((2, 3, 4, 4), 0.25)
PROMPTS = ["a", "b"]
SOURCE = """
from dataclasses import dataclass
from rewards import Reward

LIMIT = 3


class Brightness(Reward):
    def __init__(self, gain: float = 1.0, *, offset: float = 0.0):
        self.gain, self.offset = gain, offset

    def __call__(self, media, prompts, metadata):
        return media.mean((1, 2, 3)) * self.gain + self.offset


@dataclass
class Needy(Reward):
    model: str

    def __call__(self, media, prompts, metadata):
        return [0.0] * len(prompts)


class Broken(Reward):
    def __init__(self):
        raise OSError("no weights here")

    def __call__(self, media, prompts, metadata):
        return [0.0] * len(prompts)


class Callable:
    def __call__(self, media, prompts, metadata):
        return [len(prompt) for prompt in prompts]


def brightness(media, prompts, metadata, gain=1.0):
    return (media.mean((1, 2, 3)) * gain).tolist()


def rank(media, prompts, metadata, **anything):
    return [anything.get("base", 0)] * len(prompts)


rank.scope = "group"


def too_few(media, prompts):
    return [0.0] * len(prompts)


ready = Brightness(gain=2)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "options", "scores"),
    [
        ("Brightness", {}, [0.25, 0.25]),
        ("Brightness", {"gain": 2, "offset": 1}, [1.5, 1.5]),
        ("Needy", {"model": "x"}, [0, 0]),
        ("brightness", {}, [0.25, 0.25]),
        ("brightness", {"gain": 4}, [1, 1]),
        ("rank", {"base": 7}, [7, 7]),
        ("ready", {}, [0.5, 0.5]),
        ("Callable", {}, [1, 1]),
    ],
)
def test_a_class_a_function_and_an_instance_load_from_a_file(source, name, options, scores):
    reward = rewards.load(f"{source}:{name}", **options)
    assert rewards.score(reward, MEDIA, PROMPTS).tolist() == scores
    direct = reward(MEDIA, PROMPTS, [{}, {}]) if name != "Needy" else torch.tensor(scores)
    assert isinstance(direct, torch.Tensor)


def test_a_loaded_function_keeps_its_name_and_scope(source):
    reward = rewards.load(f"{source}:rank", base=1)
    assert (reward.name, reward.scope) == ("rank", "group")


def test_a_reward_loads_from_a_module(source, monkeypatch):
    package = source.parent / "lab_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    source.rename(package / "light.py")
    monkeypatch.syspath_prepend(source.parent)
    assert rewards.score(rewards.load("lab_rewards.light:Brightness"), MEDIA, PROMPTS).tolist() == [0.25, 0.25]


def test_two_files_of_one_name_stay_apart(source):
    other = source.parent / "other" / "my_reward.py"
    other.parent.mkdir()
    other.write_text(SOURCE.replace("LIMIT = 3", "LIMIT = 4"))
    assert (import_object(f"{source}:LIMIT"), import_object(f"{other}:LIMIT")) == (3, 4)


def test_an_installed_entry_point_is_a_name(source, monkeypatch):
    source.rename(source.parent / "plugged_reward.py")
    info = source.parent / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flowalign.rewards]\nglow = plugged_reward:Brightness\nlost = plugged_reward:Nothing\n"
    )
    monkeypatch.syspath_prepend(source.parent)
    assert {"glow", "ocr", "geneval"} <= set(rewards.available())
    assert rewards.score(rewards.load("glow", gain=2), MEDIA, PROMPTS).tolist() == [0.5, 0.5]
    with pytest.raises(RewardError, match="did you mean 'glow'"):
        rewards.load("glowe")
    with pytest.raises(RewardError, match="'lost' cannot be imported: AttributeError"):
        rewards.load("lost")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("orc", r"no reward 'orc'; did you mean 'ocr'\? \(known: adversarial_dino, .*geneval, .*ocr, "),
        ("GenEvall", "did you mean 'geneval'"),
        ("my_reward.py", "my_reward.py:Name"),
        ("nowhere.py:Brightness", "no file nowhere.py"),
        ("no_such_package.rewards:Glow", "no_such_package.rewards cannot be imported: ModuleNotFoundError"),
        ("rewards.ocr:OCRR", "rewards.ocr has no 'OCRR'; did you mean 'OCR'"),
        ("rewards.ocr:", "must be written"),
        (":OCR", "must be written"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error_of_one_sentence(name, words):
    with pytest.raises(RewardError, match=words) as caught:
        rewards.load(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Brightnes", {}, "my_reward.py has no 'Brightnes'; did you mean 'Brightness'"),
        ("Brightness", {"gian": 2}, r"no option 'gian'; did you mean 'gain'\? \(options: gain, offset\)"),
        ("brightness", {"prompt": 2}, "no option 'prompt'; did you mean 'gain'"),
        ("brightness", {"media": 2}, "no option 'media'"),
        ("Callable", {"gain": 2}, "no option 'gain'; it has none"),
        ("ready", {"gain": 2}, "already built and takes no option 'gain'"),
        ("Needy", {}, "missing a required argument: 'model'"),
        ("too_few", {}, "too many positional arguments"),
        ("Broken", {}, "'Broken' cannot be built: OSError: no weights here"),
        ("LIMIT", {}, "'LIMIT' is neither a Reward nor a function"),
    ],
)
def test_a_wrong_name_or_option_in_a_file_is_an_error_of_one_sentence(source, name, options, words):
    with pytest.raises(RewardError, match=words) as caught:
        rewards.load(f"{source}:{name}", **options)
    assert "\n" not in str(caught.value)


def test_a_wrong_option_of_a_built_in_reward_names_the_nearest():
    with pytest.raises(RewardError, match="'ocr' has no option 'stict'; did you mean 'strict'"):
        rewards.load("ocr", stict=True)


@pytest.mark.parametrize(("text", "words"), [("import no_such_thing", "no_such_thing"), ("def", "SyntaxError")])
def test_a_file_that_cannot_be_imported_says_why_and_leaves_nothing_behind(source, text, words):
    source.write_text(text)
    before = set(sys.modules)
    with pytest.raises(RewardError, match=f"my_reward.py cannot be imported.*{words}"):
        rewards.load(f"{source}:Brightness")
    assert not [name for name in set(sys.modules) - before if name.startswith("my_reward")]


def test_the_nearest_name_ignores_case():
    assert nearest("CPS", ["flow_sde", "dance_sde", "cps"]) == "cps"


def test_loading_one_reward_imports_no_other_and_nothing_of_flowalign(source):
    program = f"import sys, rewards; rewards.load({f'{source}:Brightness'!r}); from rewards.ocr import text_score; " + (
        "print([name for name in ('rapidocr', 'onnxruntime', 'cv2', 'rewards.geneval', 'flowalign', 'transformers') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("spelling", "module"),
    [
        ("rewards.mask2former:Mask2Former", "rewards.detectors.mask2former"),
        ("rewards.clip_colors:ColorClassifier", "rewards.detectors.colors"),
        ("rewards.remote:RemoteReward", "rewards.http.remote"),
        ("rewards.vlm_local:LocalVLM", "rewards.vlm.local"),
    ],
)
def test_module_names_of_earlier_recipes_still_work(spelling: str, module: str) -> None:
    found = import_object(spelling)
    assert found.__module__ == module and found is import_object(f"{module}:{spelling.partition(':')[2]}")
