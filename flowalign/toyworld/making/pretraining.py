"""Trains the embedded world's model from nothing: a StableDiffusion3Pipeline folder, on two CPU cores in about an hour.

There are three stages, each resumable from the work folder: the autoencoder, a cache of latents, and the transformer
with its two CLIP text encoders. Randomness is counted: the batch and noise of a step depend on (seed, step) alone.
"""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from flowalign.disk.files import make_folder, replace_json_lines, replace_text, replaced_folder
from flowalign.disk.tensors import save_state, save_tensors
from flowalign.toyworld import grammar
from flowalign.toyworld.making.training import Log
from flowalign.toyworld.moving.grammar import prompt_lists
from flowalign.toyworld.render import SIZE, render
from rewards.backbones.weights import whole
from rewards.geneval import TASKS

MAX_TOKENS = 20
WIDTH = 128
TEXT_WIDTH = 64
PROMPT_DROPOUT = 0.1
POOLED_DROPOUT = 0.5


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the grammar; words, capital letters, quotes and the gap between two sign words are tokens."""
    shapes = [row["prompt"] for task in TASKS for row in grammar.task_prompts(task)]
    pattern = r'[A-Z]|"|[a-z]+|(?<=[A-Z]) (?=[A-Z])'
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    texts = [*shapes, grammar.sign_prompt([" ".join(grammar.LETTERS)])]
    found = sorted({piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)})
    specials = ["<pad>", "<bos>", "<unk>", "<eos>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *found])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    bounds = [(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=bounds)
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_TOKENS, **names)


def make_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder from 64 x 64 x 3 pixels to 16 x 16 x 4 latents."""
    blocks = 3
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks,
        up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModelWithProjection:
    """An untrained text encoder of three layers; the pipeline reads the second to last."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_transformer() -> SD3Transformer2DModel:
    """An untrained transformer of 3.5 M parameters, with 64 image tokens and adaLN-zero."""
    model = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )
    zero = [model.proj_out, model.norm_out.linear]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


class TextTower(nn.Module):
    """Both text encoders, combined as in StableDiffusion3Pipeline."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        self.encoders = nn.ModuleList([make_text_encoder(tokenizer) for _ in range(2)])

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) -> embeddings (B, L, D), pooled (B, D)."""
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.encoders]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return hidden, torch.cat([output.text_embeds for output in outputs], dim=-1)


def _pixels(images: Iterable[np.ndarray]) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of B images (H, W, 3), uint8."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).float() / 127.5 - 1


def _examples(seed: int, stage: int, step: int, count: int, shapes: float) -> tuple[list[str], torch.Tensor]:
    rng = np.random.default_rng([seed, stage, step])
    pool = grammar.words(held_out=False)
    examples = [grammar.random_example(rng, pool, shapes) for _ in range(count)]
    return [prompt for prompt, _ in examples], _pixels(render(scene) for _, scene in examples)


def _save_state(path: Path, step: int, parts: Mapping[str, Any]) -> None:
    save_state(path, {"step": step, **{name: part.state_dict() for name, part in parts.items()}})


def _resumed(path: Path, parts: Mapping[str, Any]) -> int:
    """Loads the last saved state into the parts; returns the step to continue with, 0 if nothing was saved."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def train_autoencoder(work: Path, seed: int, steps: int, batch: int, log: Log) -> AutoencoderKL:
    """Trains the autoencoder on L1 + 2 MSE + a small KL; the latents' scaling and shift come from their statistics."""
    finished = work / "vae"
    if finished.exists():
        return whole(AutoencoderKL.from_pretrained, finished)
    torch.manual_seed(seed)
    model = make_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    started = time.perf_counter()
    for step in range(_resumed(work / "vae.pt", parts), steps):
        _, pixels = _examples(seed, 0, step, batch, shapes=0.5)
        torch.manual_seed(seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            decoded = model.decode(posterior.sample()).sample.float()
            loss = F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + 2e-4 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), pixels) / 4).item()
            log(f"vae {step + 1}/{steps} loss {loss.item():.4f} psnr {psnr:.1f} {time.perf_counter() - started:.0f} s")
            _save_state(work / "vae.pt", step + 1, parts)
    model.eval()
    with torch.no_grad():
        latents = model.encode(_examples(seed, 1, 0, 512, shapes=0.5)[1]).latent_dist.mean
    model.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    with replaced_folder(finished) as partial:
        model.save_pretrained(partial)
    return model


@torch.no_grad()
def cache_latents(
    work: Path, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, seed: int, shards: int, shapes: float, log: Log
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (N, 4, 16, 16), half precision, and token ids (N, 20), uint8, of N = 8,192 `shards` drawn images."""
    folder = make_folder(work / "latents")
    vae.eval()
    parts = []
    for shard in range(shards):
        path = folder / f"{shard:04d}.safetensors"
        if not path.exists():
            prompts, pixels = _examples(seed, 2, shard, 8192, shapes)
            with torch.autocast("cpu", torch.bfloat16):
                means = torch.cat([vae.encode(chunk).latent_dist.mean.float() for chunk in pixels.split(256)])
            latents = (means - vae.config.shift_factor) * vae.config.scaling_factor
            ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
            save_tensors(path, {"latents": latents.half(), "ids": ids.to(torch.uint8)})
            log(f"latents {shard + 1}/{shards}")
        parts.append(load_file(path))
    return torch.cat([part["latents"] for part in parts]), torch.cat([part["ids"] for part in parts])


def _optimizers(transformer: nn.Module, text: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices = [p for n, p in transformer.named_parameters() if "transformer_blocks" in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*transformer.parameters(), *text.parameters()] if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01),
    ]


def _learning_rate(step: int, steps: int, decay: float) -> float:
    """Factor on the learning rate: warm-up over 100 steps, then 1, then linear to 0 over the last share `decay`."""
    return min(1.0, (step + 1) / 100, (steps - step) / (decay * steps))


def _sigmas(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sigmas (count,), half of them logit-normal and half uniform."""
    normal = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.arange(count) % 2 == 0, normal, uniform)


def train_transformer(
    work: Path,
    data: tuple[torch.Tensor, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    steps: int,
    batch: int,
    decay: float,
    log: Log,
    start: Path | None = None,
) -> tuple[SD3Transformer2DModel, TextTower]:
    """Trains the transformer by flow matching on the cached latents: || v(x_sigma, sigma, prompt) - (noise - x0) ||^2.

    Until the learning rate decays, the pooled text is dropped from half of the examples. Without this the model reads
    only the pooled text, and draws the right number of letters but not the right letters. start: a pipeline folder
    whose weights the training begins with.
    """
    torch.manual_seed(seed)
    transformer, text = make_transformer(), TextTower(tokenizer)
    if start is not None:
        load = partial(whole, subfolder="transformer", dtype=torch.float32)
        transformer = load(SD3Transformer2DModel.from_pretrained, start)
        for index, name in enumerate(("text_encoder", "text_encoder_2")):
            text.encoders[index] = load(CLIPTextModelWithProjection.from_pretrained, start, subfolder=name)
    transformer.train()
    text.train()
    optimizers = _optimizers(transformer, text)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parts = {"transformer": transformer, "text": text, "muon": optimizers[0], "adamw": optimizers[1]}
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    first = _resumed(work / "transformer.pt", parts)
    started, total = time.perf_counter(), 0.0
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        silence = POOLED_DROPOUT if step < (1 - decay) * steps else 0.0
        loss = _flow_matching(transformer, text, data, empty, batch, silence, generator)
        loss.backward()
        nn.utils.clip_grad_norm_([*transformer.parameters(), *text.parameters()], 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * _learning_rate(step, steps, decay)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            rate_now = batch * (step + 1 - first) / (time.perf_counter() - started)
            log(f"transformer {step + 1}/{steps} loss {total / 100:.4f} {rate_now:.0f} images/s")
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            _save_state(work / "transformer.pt", step + 1, parts)
    return transformer, text


def _flow_matching(
    transformer: SD3Transformer2DModel,
    text: TextTower,
    data: tuple[torch.Tensor, torch.Tensor],
    empty: torch.Tensor,
    batch: int,
    silence: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """The loss of a batch that the generator draws; a share `silence` of the examples has no pooled text."""
    latents, ids = data
    rows = torch.randint(len(latents), (batch,), generator=generator)
    x0, tokens = latents[rows].float(), ids[rows].long()
    dropped = torch.rand(batch, 1, generator=generator) < PROMPT_DROPOUT
    tokens = torch.where(dropped, empty, tokens)
    sigma = _sigmas(batch, generator)
    noise = torch.randn(x0.shape, generator=generator)
    x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        hidden, pooled = text(torch.cat([tokens, empty]))
        hidden, unsaid, pooled = hidden[:-1], pooled[-1:], pooled[:-1]
        if silence:
            silent = torch.rand(batch, 1, generator=generator) < silence
            pooled = torch.where(silent, unsaid, pooled)
        velocity = transformer(x, hidden, pooled, sigma * 1000, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - x0)


def assemble(
    folder: Path,
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    text: TextTower,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Writes the pipeline folder in half precision, without a T5."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text.encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text.encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def write_prompts(folder: Path) -> None:
    """Writes the bundled prompt lists: shapes (GenEval's .jsonl), signs (.txt) and the moving world (.jsonl)."""
    make_folder(folder)
    for held_out, name in ((False, "train"), (True, "test")):
        shapes = grammar.split_shapes(per_task=86 if held_out else 200, held_out=held_out)
        replace_json_lines(folder / f"shapes_{name}.jsonl", shapes)
        signs = grammar.split_signs(512 if held_out else 720, held_out)
        replace_text(folder / f"words_{name}.txt", "".join(sign + "\n" for sign in signs))
    for name, rows in prompt_lists():
        replace_json_lines(folder / f"moving_{name}.jsonl", rows)
