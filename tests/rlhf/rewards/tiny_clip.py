"""Tiny CLIP folders and aesthetic heads with random weights, in the real formats."""

import math
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

from rlhf.rewards.clip import aesthetic_head


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a CLIPModel folder (config, safetensors, tokenizer, processor) of ~0.2 M weights; returns `folder`.

    The tokenizer is CLIP's with a vocabulary of single bytes, so every text has an encoding, of a token per byte. The
    weights are drawn wider than usual so that a score depends visibly on picture and prompt.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocabulary, merges=[], model_max_length=77)
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    last = len(tokens) - 1
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_factor": 5.0}
    ids = {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    text = shape | ids | {"hidden_size": 32, "intermediate_size": 64}
    vision = shape | {"hidden_size": 64, "intermediate_size": 128, "image_size": 64, "patch_size": 8}
    sizes = {"projection_dim": 32, "logit_scale_init_value": math.log(100)}  # as CLIPs, PickScore too, are trained to
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config)
    model.save_pretrained(folder)
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def write_aesthetic_head(file: Path, *, width: int = 32, seed: int = 0) -> Path:
    """Write an aesthetic predictor (a .pth in the published layout) for features of `width`; returns `file`.

    Drawn so that no layer shrinks what it is given: the score depends visibly on the picture.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) / math.sqrt(value.shape[-1])
        for name, value in aesthetic_head(width).state_dict().items()
    }
    torch.save(state, file)
    return file
