"""GenEval's detector on small models of the real classes: the library's post-processing, boxes, names and colours."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

import rewards
from flowalign.rollout.prompts import load_prompts
from rewards import RewardError
from rewards.backbones.weights import bundled
from rewards.detectors.base import COLORS
from rewards.detectors.colors import ColorClassifier
from rewards.detectors.mask2former import Mask2Former, class_names, extents, instances
from rewards.geneval import refuse_unknown_classes
from rewards.media import as_levels

SPEC = "rewards.detectors.mask2former:Mask2Former"
COCO = [row for row in bundled("geneval/object_names.txt").read_text().split("\n") if row]
CAT, DOG = COCO.index("cat"), COCO.index("dog")
PROMPT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """An open_clip folder with random weights: 32 x 32 pictures, the library's own tokenizer."""
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**{**config, "vision_cfg": {**vision}, "text_cfg": {**text}})
    for weight in model.parameters():  # so that words and pictures differ as they do in a trained model
        nn.init.normal_(weight, std=0.2) if weight.ndim > 1 else None
    looks = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": looks}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Mask2Former folder with random weights, twelve queries and COCO's labels, of which it sees mostly cats."""
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=dict(enumerate("motorbike" if name == "motorcycle" else name for name in COCO)),
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        nn.init.normal_(model.class_predictor.weight, std=1.0)
        model.class_predictor.bias[CAT] = 7.0
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(model_folder, clip_folder):
    return Mask2Former(str(model_folder), str(clip_folder), shortest_edge=96, device="cpu")


@pytest.fixture(scope="module")
def pictures():
    """(3, 3, 72, 96): smooth colours with noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(3, 3, 5, 6, generator=generator), (72, 96), mode="bicubic")
    return (coarse + 0.05 * torch.randn(coarse.shape, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def seen(detector, pictures):
    """Detections of the pictures."""
    return detector(pictures)


def logits_of(*objects, queries=6, size=(96, 96)):
    """Class logits (Q, 81) and mask logits (Q, h, w) of objects (label, class logit, rows, columns)."""
    classes, masks = torch.zeros(queries, 81), torch.full((queries, *size), -8.0)
    classes[:, -1] = 12.0
    for query, (label, logit, rows, columns) in enumerate(objects):
        classes[query, -1] = 0.0
        classes[query, label] = logit
        masks[query, rows, columns] = 8.0
    return classes, masks


# Post-processing


@pytest.mark.parametrize("size", [(72, 96), (500, 301)])
def test_instances_are_those_of_the_librarys_own_post_processing(size):
    generator = torch.Generator().manual_seed(1)
    classes = 4 * torch.randn(2, 20, 81, generator=generator)
    masks = 4 * F.interpolate(torch.randn(2, 20, 5, 5, generator=generator), (24, 24), mode="bicubic") - 3
    masks[:, ::5] = -1.0  # queries without a pixel
    outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    library = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[size] * 2, return_binary_maps=True
    )
    for expected, *logits in zip(library, classes, masks, strict=True):
        found = instances(*logits, size)
        segments = expected["segments_info"]
        order = sorted(range(len(segments)), key=lambda index: -segments[index]["score"])
        assert 0 < len(segments) < 20
        assert found.labels == [segments[index]["label_id"] for index in order]
        assert found.scores == pytest.approx([segments[index]["score"] for index in order], abs=2e-6)
        assert torch.equal(found.masks, expected["segmentation"][order].bool())


def test_a_box_is_its_masks_extent_with_exclusive_ends():
    classes, masks = logits_of((CAT, 9.0, slice(10, 20), slice(30, 60)), (DOG, 3.0, slice(0, 96), slice(95, 96)))
    found = instances(classes, masks, (384, 384))
    assert found.labels[:2] == [CAT, DOG]
    for box, exact in zip(found.boxes, ([120, 40, 240, 80], [380, 0, 384, 384]), strict=False):
        assert box == pytest.approx(exact, abs=2)  # a mask's edge lies between the pixels of the logits
    probability = torch.tensor([9.0, *[0.0] * 80]).softmax(0)[0].item()
    assert 0.9 * probability < found.scores[0] < probability
    assert found.scores == sorted(found.scores, reverse=True)


@pytest.mark.parametrize(("rows", "columns"), [(slice(0, 1), slice(0, 1)), (slice(3, 7), slice(2, 9))])
def test_extents_cover_exactly_the_masks_pixels(rows, columns):
    mask = torch.zeros(1, 7, 9, dtype=torch.bool)
    mask[0, rows, columns] = True
    assert extents(mask) == [[columns.start, rows.start, columns.stop, rows.stop]]


def test_an_image_in_which_nothing_is_found_has_no_instances():
    classes, masks = logits_of()
    found = instances(classes, masks, (50, 60))
    assert (found.labels, found.scores, found.boxes, found.masks.shape) == ([], [], [], (0, 50, 60))


# The detector


def test_detections_have_genevals_form(seen):
    for detections in seen:
        assert 0 < len(detections) <= 12
        assert {detection["class"] for detection in detections} <= set(COCO)
        for detection in detections:
            x0, y0, x1, y1 = detection["box"]
            assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 72
            assert 0 < detection["score"] <= 1
            assert detection["color"] in (COLORS if detection["score"] > 0.3 else ("",))
    scores = [detection["score"] for detections in seen for detection in detections]
    assert min(scores) < 0.3 < max(scores)
    assert "cat" in {detection["class"] for detections in seen for detection in detections}


def test_detections_are_those_of_the_librarys_pipeline(model_folder, detector, pictures, seen):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(model_folder).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(model_folder)
    files = [to_pil_image(picture) for picture in (pictures * 255).round().to(torch.uint8)]
    inputs = processor(files, size={"shortest_edge": 96, "longest_edge": 160}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 96, 128)
    with torch.no_grad():
        outputs = model(**inputs)
    library = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(72, 96)] * 3, return_binary_maps=True
    )
    for expected, found in zip(library, seen, strict=True):
        pairs = [(COCO[segment["label_id"]], segment["score"]) for segment in expected["segments_info"]]
        pairs.sort(key=lambda pair: -pair[1])
        assert [detection["class"] for detection in found] == [name for name, _ in pairs]
        assert [detection["score"] for detection in found] == pytest.approx([score for _, score in pairs], abs=1e-4)


def test_the_detections_of_an_image_do_not_depend_on_the_others(detector, pictures, seen):
    detector.batch_size = 1
    try:
        for picture, expected in zip(pictures, seen, strict=True):
            (alone,) = detector(picture[None])
            for key in ("class", "color", "box"):
                assert [one[key] for one in alone] == [one[key] for one in expected]
            assert [one["score"] for one in alone] == pytest.approx([one["score"] for one in expected], abs=1e-5)
        assert detector(pictures) == [detector(picture[None])[0] for picture in pictures]
    finally:
        detector.batch_size = 8


def test_geneval_takes_the_detector_by_name_with_options(model_folder, clip_folder, pictures):
    options = {"model": str(model_folder), "clip": str(clip_folder), "shortest_edge": 96, "device": "cpu"}
    reward = rewards.load("geneval", detector=SPEC, detector_options=options)
    found = [detection for detection in reward.detector(pictures[:1])[0] if detection["score"] > 0.3]
    same = [detection["class"] for detection in found].count(found[0]["class"])
    rows = [
        {"tag": "colors", "include": [{"class": found[0]["class"], "count": count}]}
        for count in (same, same + 1, 3 * same)
    ]
    scores = rewards.score(reward, pictures[:1].expand(3, -1, -1, -1), ["a photo"] * 3, rows)
    assert scores.tolist() == pytest.approx([1, same / (same + 1), 1 / 3])


def test_without_a_size_the_processors_size_is_used(model_folder, clip_folder, pictures):
    own = Mask2Former(str(model_folder), str(clip_folder), shortest_edge=None, device="cpu")
    sizes = []
    own.network.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    own(pictures[:1])
    assert sizes == [(1, 3, 64, 64)]


def test_the_detectors_identity_names_model_size_and_clip_and_changes_with_the_weights(
    model_folder, clip_folder, detector, tmp_path
):
    identity = detector.identity()
    weights = (model_folder / "model.safetensors").read_bytes()
    assert identity["checksum"] == hashlib.sha256(weights).hexdigest()
    assert identity["detector"] == f"{model_folder} at 96 pixels, colors by {clip_folder}"
    other = shutil.copytree(model_folder, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["class_predictor.bias"] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    changed = Mask2Former(str(other), str(clip_folder), device="cpu").identity()["checksum"]
    assert changed != identity["checksum"]


# Names


def test_the_detectors_names_are_genevals_and_cover_every_official_prompt(detector):
    assert list(detector.names) == COCO
    refuse_unknown_classes(detector, [row.metadata for row in load_prompts("geneval")])


def test_labels_are_cocos_when_most_agree_or_none_is_named():
    darknet = {"motorcycle": "motorbike", "airplane": "aeroplane", "tv": "tvmonitor", "tv remote": "remote"}
    assert class_names([darknet.get(name, name) for name in COCO]) == tuple(COCO)
    assert class_names([f"LABEL_{index}" for index in range(80)]) == tuple(COCO)
    assert class_names(COCO[:3]) == tuple(COCO[:3])
    others = [f"thing {index}" for index in range(80)]
    assert class_names(others) == tuple(others)


def test_a_file_of_names_is_taken_in_the_models_order(model_folder, clip_folder, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("".join(f"thing {index}\n" for index in range(80)))
    detector = Mask2Former(str(model_folder), str(clip_folder), names=str(file))
    assert detector.names[CAT] == f"thing {CAT}"
    with pytest.raises(RewardError, match=r"asks? for the class 'cat', which the detector does not have; the nearest"):
        refuse_unknown_classes(detector, [PROMPT])


# Colours


@pytest.fixture(scope="module")
def colors(clip_folder):
    return ColorClassifier(str(clip_folder), "mask2former", "cpu")


def test_colors_are_those_of_the_published_recipe(clip_folder, colors, pictures):
    """Spelt out with PIL and open_clip: the object on #999, cropped, against normalised means of three templates."""
    masks = torch.zeros(3, 72, 96, dtype=torch.bool)
    places = [(slice(5, 40), slice(10, 30)), (slice(0, 72), slice(40, 96)), (slice(60, 66), slice(3, 9))]
    for mask, place in zip(masks, places, strict=True):
        mask[place] = torch.rand(mask[place].shape, generator=torch.Generator().manual_seed(2)) > 0.3
    boxes, names = extents(masks), ["cat", "wine glass", "cat"]
    name = f"local-dir:{clip_folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    picture = to_pil_image((pictures[0] * 255).round().to(torch.uint8))
    expected, margins = [], []
    for mask, box, kind in zip(masks, boxes, names, strict=True):
        ground = Image.new("RGB", picture.size, color="#999")
        crop = Image.composite(picture, ground, Image.fromarray(mask.numpy())).crop(box)
        templates = (f"a photo of a {{c}} {kind}", f"a photo of a {{c}}-colored {kind}", "a photo of a {c} object")
        with torch.no_grad():
            image = F.normalize(model.eval().encode_image(transform(crop)[None]), dim=-1)[0]
            texts = [model.encode_text(tokenizer([text.format(c=color) for text in templates])) for color in COLORS]
        classifier = torch.stack([F.normalize(F.normalize(text, dim=-1).mean(0), dim=0) for text in texts])
        torch.testing.assert_close(colors.directions(kind), classifier, atol=1e-5, rtol=0)
        similarity = classifier @ image
        expected.append(COLORS[int(similarity.argmax())])
        margins.append(float(similarity.topk(2).values.diff().abs()))
    assert min(margins) > 1e-4
    assert colors(pictures[0], masks, boxes, names) == expected


def test_what_surrounds_an_object_does_not_change_its_color(colors, pictures):
    mask = torch.zeros(1, 72, 96, dtype=torch.bool)
    mask[0, 10:40, 20:60] = (torch.arange(30)[:, None] + torch.arange(40)) % 3 > 0
    repainted = torch.where(mask, pictures[0], torch.tensor([1.0, 0.0, 0.0])[:, None, None])
    crops = []
    encode = colors.clip.image_features
    try:
        colors.clip.image_features = lambda images: crops.append(images) or encode(images)
        for image in (pictures[0], repainted):
            colors(image, mask, extents(mask), ["cat"])
    finally:
        colors.clip.image_features = encode
    assert torch.equal(*crops)
    picture = to_pil_image((pictures[0] * 255).round().to(torch.uint8))
    ground = Image.new("RGB", picture.size, color="#999")
    expected = Image.composite(picture, ground, Image.fromarray(mask[0].numpy())).crop((20, 10, 60, 40))
    assert torch.equal(as_levels(crops[0])[0], pil_to_tensor(expected))


# Mistakes


@pytest.mark.parametrize(
    ("prepare", "options", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), {}, "is no local folder and cannot be fetched from the hub"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "cannot be loaded: OSError"),
        (lambda folder: (folder / "config.json").unlink(), {}, "cannot be loaded"),
        (lambda folder: relabel(folder, model_type="clip"), {}, "cannot be loaded: ValueError: it is a clip, not a"),
        (lambda folder: forget(folder), {}, "cannot be loaded: ValueError: the weights lack class_predictor.bias"),
        (lambda folder: None, {"names": "absent.txt"}, "names absent.txt cannot be read"),
        (lambda folder: None, {"names": __file__}, r"must have 80 lines, a name for each class; it has \d+"),
        (lambda folder: None, {"clip": "absent/clip"}, "CLIP model 'absent/clip' cannot be loaded"),
        (lambda folder: None, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        (lambda folder: None, {"shortest_edge": 0}, "shortest_edge must be at least 1, not 0"),
    ],
    ids=["folder", "weights", "config", "class", "missing", "names", "many names", "clip", "batch", "size"],
)
def test_a_mistake_is_one_sentence(model_folder, clip_folder, tmp_path, monkeypatch, prepare, options, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    prepare(folder)
    options = {"model": str(folder), "clip": str(clip_folder), "device": "cpu", **options}
    with pytest.raises(RewardError, match=sentence) as raised:
        rewards.load("geneval", detector=SPEC, detector_options=options)
    assert "\n" not in str(raised.value)


def relabel(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def forget(folder):
    state = load_file(folder / "model.safetensors")
    del state["class_predictor.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_a_detector_that_is_not_a_class_takes_no_options():
    with pytest.raises(RewardError, match="is not a class and takes no detector_options"):
        rewards.load("geneval", detector="flowalign.toyworld.detector:detect", detector_options={"model": "x"})


def test_a_class_that_the_detector_does_not_know_is_refused_before_any_image_is_judged(detector, pictures):
    reward = rewards.load("geneval", detector=lambda media: pytest.fail("it was asked"))
    reward.detector.names = detector.names
    row = {"tag": "single_object", "include": [{"class": "computer mous", "count": 1}]}
    with pytest.raises(RewardError, match=r"ask for the class 'computer mous', .* its 80 is 'computer mouse'"):
        rewards.score(reward, pictures[:1], ["a photo"], [row])
