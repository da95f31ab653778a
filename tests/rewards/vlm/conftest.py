"""Tiny vision-language models of real classes, random and far from uniform in what they answer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined %}<think>\n"
    "{% if not enable_thinking %}\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)
WORDS = ["Yes", "yes", "YES", " Yes", " yes", " YES", "No", "no", "NO", " No", " no", " NO", "a photo of two red stars"]
SQUARE = {"height": 16, "width": 16}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "max_position_embeddings": 512,
}
Made = tuple[Any, Any]  # a model and its processor


def words(*special: str, **named: str) -> Any:
    """A byte-level tokenizer with special tokens, some of which it has by name; and the text model's settings."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *special, *named.values())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(WORDS * 9, trainer)
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": named}
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


def text_of(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), **ids, **TEXT, **settings}


def mrope(**settings: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4, **settings}


def chat(tokenizer: Any, image: str) -> dict[str, Any]:
    return {"tokenizer": tokenizer, "chat_template": TEMPLATE.replace("IMAGE", image)}


def qwen(kind: str, text: dict[str, Any], vision: dict[str, Any], processor: str | None = None) -> Made:
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = words(*names)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    size = {"patch_size": 4, "merge_size": 2}
    config = getattr(tf, f"{kind}Config")(
        text_config=text_of(tokenizer, **text),
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4, **vision},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    video_kind = tf.Qwen3VLVideoProcessor if "3" in kind else tf.Qwen2VLVideoProcessor
    return getattr(tf, f"{kind}ForConditionalGeneration")(config), getattr(tf, processor or f"{kind}Processor")(
        image_processor=tf.Qwen2VLImageProcessor(**size, size={"shortest_edge": 64, "longest_edge": 1024}),
        video_processor=video_kind(**size),
        **chat(tokenizer, "".join((names[0], names[2], names[1]))),
    )


def qwen2_vl() -> Made:
    return qwen("Qwen2VL", {"rope_parameters": mrope()}, {"embed_dim": 32, "mlp_ratio": 2})


def qwen2_5_vl() -> Made:
    vision = {"intermediate_size": 48, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    return qwen("Qwen2_5_VL", {"rope_parameters": mrope()}, vision)


QWEN3 = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}


def qwen3_vl() -> Made:
    text = {"head_dim": 8, "rope_parameters": mrope(mrope_interleaved=True)}
    return qwen("Qwen3VL", text, {**QWEN3, "deepstack_visual_indexes": [0]})


def qwen3_5() -> Made:
    text = {"head_dim": 16, "rope_parameters": mrope(mrope_interleaved=True, partial_rotary_factor=0.5)}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    text |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    return qwen("Qwen3_5", text, {**QWEN3, "deepstack_visual_indexes": []}, "Qwen3VLProcessor")


def llava() -> Made:
    tokenizer = words("<image>")
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return tf.LlavaForConditionalGeneration(config), tf.LlavaProcessor(
        image_processor=tf.CLIPImageProcessor(size=SQUARE, crop_size=SQUARE),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **chat(tokenizer, "<image>"),
    )


def llava_next() -> Made:
    tokenizer, grid = words("<image>"), [[16, 32], [32, 16], [32, 32]]
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    return tf.LlavaNextForConditionalGeneration(config), tf.LlavaNextProcessor(
        image_processor=tf.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=grid
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        **chat(tokenizer, "<image>"),
    )


def llava_onevision() -> Made:
    tokenizer, grid = words("<image>", "<video>"), [[16, 32], [32, 16], [32, 32]]
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=8, vision_use_head=False),
        text_config=tf.Qwen2Config(**text_of(tokenizer)),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=grid,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), tf.LlavaOnevisionProcessor(
        image_processor=tf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=grid),
        video_processor=tf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        **chat(tokenizer, "<image>"),
    )


def internvl() -> Made:
    tokenizer = words(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG>", video_token="<video>"
    )
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**VISION, image_size=[16, 16], patch_size=[4, 4]),
        text_config=tf.Qwen2Config(**text_of(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return tf.InternVLForConditionalGeneration(config), tf.InternVLProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3),
        video_processor=tf.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
        **chat(tokenizer, "<IMG>"),
    )


def aya_vision() -> Made:
    names = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tokenizer = words(*names, "TILE", "TILE_GLOBAL")
    layers = ["sliding_attention", "full_attention"]
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4),
        text_config=tf.Cohere2Config(**text_of(tokenizer), sliding_window=16, layer_types=layers),
        vision_feature_layer=-1,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return tf.AyaVisionForConditionalGeneration(config), tf.AyaVisionProcessor(
        image_processor=tf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=3),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        **chat(tokenizer, "<image>"),
    )


def lfm2_vl() -> Made:
    tokenizer = words(
        *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail="<|img_thumbnail|>",
    )
    vision = {**VISION, "num_patches": 16, "patch_size": 4, "vision_use_head": False}
    config = tf.Lfm2VlConfig(
        vision_config=tf.Siglip2VisionConfig(**vision),
        text_config=tf.Lfm2Config(
            **text_of(tokenizer, layer_types=["conv", "full_attention"], block_ff_dim=48),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        projector_hidden_size=32,
    )
    size = {"tile_size": 16, "encoder_patch_size": 4, "downsample_factor": 2, "max_num_patches": 64}
    return tf.Lfm2VlForConditionalGeneration(config), tf.Lfm2VlProcessor(
        image_processor=tf.Lfm2VlImageProcessor(
            **size, min_image_tokens=2, max_image_tokens=8, do_image_splitting=False
        ),
        **chat(tokenizer, "<image>"),
    )


def gemma3() -> Made:
    tokenizer = words(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    names = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    start, end, image = tokenizer.convert_tokens_to_ids(list(names))
    layers = ["sliding_attention", "full_attention"]
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False),
        text_config=tf.Gemma3TextConfig(**text_of(tokenizer), head_dim=8, sliding_window=16, layer_types=layers),
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
    )
    return tf.Gemma3ForConditionalGeneration(config), tf.Gemma3Processor(
        image_processor=tf.Gemma3ImageProcessor(size=SQUARE), image_seq_length=4, **chat(tokenizer, names[0])
    )


def glm4v() -> Made:
    tokenizer = words("<|begin_of_image|>", "<|end_of_image|>", image_token="<|image|>", video_token="<|video|>")
    names = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    config = tf.Glm4vConfig(
        text_config=text_of(tokenizer, rope_parameters=mrope(partial_rotary_factor=1.0)),
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
        | {"image_size": 32, "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=start,
        image_end_token_id=end,
    )
    size = {"patch_size": 4, "merge_size": 2}
    return tf.Glm4vForConditionalGeneration(config), tf.Glm4vProcessor(
        image_processor=tf.Glm4vImageProcessor(**size, size={"shortest_edge": 64, "longest_edge": 1024}),
        video_processor=tf.Glm4vVideoProcessor(**size),
        **chat(tokenizer, "".join((names[0], names[2], names[1]))),
    )


def idefics2() -> Made:
    tokenizer = words("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    sampler = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2}
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 32, "patch_size": 4},
        perceiver_config={**sampler, "resampler_head_dim": 16, "num_key_value_heads": 1},
        text_config=tf.MistralConfig(**text_of(tokenizer), sliding_window=None),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return tf.Idefics2ForConditionalGeneration(config), tf.Idefics2Processor(
        image_processor=tf.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}),
        image_seq_len=4,
        **chat(tokenizer, "<image>"),
    )


def idefics3() -> Made:
    tokenizer = words(
        *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    config = tf.Idefics3Config(
        vision_config={**VISION, "image_size": 16, "patch_size": 4},
        text_config=tf.LlamaConfig(**text_of(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tf.Idefics3ForConditionalGeneration(config), tf.Idefics3Processor(
        image_processor=tf.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        image_seq_len=4,
        **chat(tokenizer, "<image>"),
    )


def mistral3() -> Made:
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = words(*names)
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION, image_size=32, patch_size=4),
        text_config=tf.MistralConfig(**text_of(tokenizer), sliding_window=16, head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    tokens = dict(zip(("image_token", "image_break_token", "image_end_token"), names, strict=True))
    patch = {"height": 4, "width": 4}
    return tf.Mistral3ForConditionalGeneration(config), tf.PixtralProcessor(
        image_processor=tf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=patch),
        patch_size=4,
        spatial_merge_size=2,
        **tokens,
        **chat(tokenizer, "[IMG]"),
    )


def mllama() -> Made:
    tokenizer = words("<|image|>")
    tokenizer.bos_token = "<|im_start|>"
    text = text_of(tokenizer, num_hidden_layers=3, cross_attention_layers=[1], bos_token_id=tokenizer.bos_token_id)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    return tf.MllamaForConditionalGeneration(config), tf.MllamaProcessor(
        image_processor=tf.MllamaImageProcessor(size=SQUARE, max_image_tiles=2), **chat(tokenizer, "<|image|>")
    )


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a type, such as "qwen2_5_vl"."""

    @cache
    def saved(kind: str) -> Path:
        torch.manual_seed(0)
        model, processor = globals()[kind]()
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():  # far from uniform answers
            if weight.ndim > 1:
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return saved
