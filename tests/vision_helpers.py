"""Tiny random vision-language models, and queries with an image in front of the text: no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

# Behind the 400 of the tiny tokenizer.
IMAGE, VIDEO, VISION_START, VISION_END = 400, 401, 402, 403
ARCHITECTURES = ("qwen2_vl", "qwen3_vl", "llava", "llava_onevision", "gemma3")
# Tokens that one image is expanded to.
N_IMAGE_TOKENS = 16


def layer(index: int = 1) -> str:
    """The value matrix of one layer, as EasyEdit names it; the same in all of these."""
    return f"model.language_model.layers[{index}].mlp.down_proj.weight"


def build_vision_model(architecture: str, seed: int = 0, n_layers: int = 3, width: int = 32) -> Any:
    """A random model of 404 tokens that reads an image as 16 of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _BUILDERS[architecture](_text(n_layers, width)).eval()


def _text(n_layers: int, width: int) -> dict[str, Any]:
    return {
        "vocab_size": 404,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.2 if width == 32 else 0.05,
    }


def _tower(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }


def _qwen2_vl(text: dict[str, Any]) -> Any:
    width, rotary = text["hidden_size"], text["head_dim"] // 2
    sections = [rotary - 2 * (rotary // 4), rotary // 4, rotary // 4]
    text = {**text, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}}
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": width, "num_heads": 4, "patch_size": 4}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    marks = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config={**tower, "spatial_merge_size": 2}, **tokens, **marks)
    )


def _qwen3_vl(text: dict[str, Any]) -> Any:
    width, rotary = text["hidden_size"], text["head_dim"] // 2
    sections = [rotary - 2 * (rotary // 4), rotary // 4, rotary // 4]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, "mrope_interleaved": True}
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}
    tower |= {"out_hidden_size": width, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    marks = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={**tower, "spatial_merge_size": 2, "temporal_patch_size": 2},
            **tokens,
            **marks,
        )
    )


def _llava(text: dict[str, Any]) -> Any:
    tower = {"model_type": "clip_vision_model", **_tower(32), "projection_dim": 32}
    config = LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _llava_onevision(text: dict[str, Any]) -> Any:
    tower = {"model_type": "siglip_vision_model", **_tower(32), "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=tower,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _gemma3(text: dict[str, Any]) -> Any:
    tower = {"model_type": "siglip_vision_model", **_tower(32), "vision_use_head": False}
    config = Gemma3Config(
        text_config={**text, "sliding_window": 128},
        vision_config=tower,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        mm_tokens_per_image=N_IMAGE_TOKENS,
    )
    return Gemma3ForConditionalGeneration(config)


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "gemma3": _gemma3,
}


def with_image(model: Any, tok: Any, text: str, seed: int = 0, n_images: int = 1) -> dict[str, Tensor]:
    """What a processor makes of images, random ones here, with a text behind them: keyword arguments of the model."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    # Llava-OneVision: the image as a whole, and its one tile of four rows, each with a token that ends it.
    n_tokens = 2 * N_IMAGE_TOKENS + 4 if kind == "llava_onevision" else N_IMAGE_TOKENS
    image = [IMAGE] * n_tokens
    if not kind.startswith("llava"):  # which marks neither its beginning nor its end
        image = [VISION_START, *image, VISION_END]
    ids = torch.tensor([[*image * n_images, *tok(text)["input_ids"]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("qwen2_vl", "qwen3_vl"):
        # 8 x 8 patches of 4 x 4 pixels, two frames each; 2 x 2 patches are one token.
        inputs["pixel_values"] = torch.randn(64 * n_images, 3 * 2 * 4 * 4, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 8, 8]] * n_images)
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        return inputs
    pixels = torch.randn(n_images, 3, 16, 16, generator=generator)
    if kind == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if kind == "llava_onevision":
        pixels = pixels[:, None].expand(-1, 2, -1, -1, -1)
        inputs["image_sizes"] = torch.tensor([[16, 16]] * n_images)
    return {**inputs, "pixel_values": pixels}


_CHAT = (
    "{% for turn in messages %}{{ turn['role'] }}: {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<start><image><end>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def build_processor(architecture: str) -> Any:
    """The processor of one of these models, which needs torchvision: its tokenizer, images, and a chat template."""
    from transformers import (
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tok = build_tokenizer()
    if architecture == "llava_onevision":
        tok.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
        size = {"height": 16, "width": 16}
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[16, 16]]),
            tokenizer=tok,
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=N_IMAGE_TOKENS,
            vision_feature_select_strategy="full",
            chat_template=_CHAT.replace("<start>", "").replace("<end>", ""),
        )
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tok.add_special_tokens({"additional_special_tokens": names})
    marked = _CHAT.replace("<start>", names[2]).replace("<image>", names[0]).replace("<end>", names[3])
    patches = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    kinds = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
        "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }
    processor, video = kinds[architecture]
    return processor(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tok,
        video_processor=video(**patches),
        chat_template=marked,
    )


def save_vision_model(architecture: str, folder: Path) -> None:
    """A model and its processor in a folder, as EasyEdit loads them."""
    model = build_vision_model(architecture)
    if architecture == "llava_onevision":
        model.config.vision_feature_select_strategy = "full"
    model.save_pretrained(folder)
    build_processor(architecture).save_pretrained(folder)
