"""The toybox's tokenizer and its two text encoders: stock CLIP, with a vocabulary of a few hundred entries."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mip.toybox.scenes import BACKGROUNDS, CLASSES, COLOURS, PATTERNS, PLACES

LENGTH = 32  # tokens, with start and end: three objects with their colours
WORDS = sorted(
    {
        *CLASSES,
        *COLOURS,
        *PATTERNS,
        *BACKGROUNDS,
        *(word for place in PLACES.values() for word in place.split()),
        *"a an and with beside near next to of photo picture image small big left right one two three".split(),
    }
)
START, END = "<|startoftext|>", "<|endoftext|>"
_MERGES = Path(__file__).with_name("merges.txt")  # trained once and kept: a BPE trainer breaks ties at random


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows each of our words as one token, and any other text as bytes."""
    merges = [tuple(line.split()) for line in _MERGES.read_text(encoding="utf-8").splitlines()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    result = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=LENGTH)  # pyright: ignore[reportArgumentType]
    for word in WORDS:
        assert len(result(word).input_ids) == 3, f"{word!r} is not one token; its merges are missing in {_MERGES.name}"
    return result


def encoders(words: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Fresh encoders of width 64 and 96, with two layers each.

    The penultimate states are those after the first: a noun has seen the adjectives before it, as in SDXL, so that
    "a red star and a blue car" says which is red.
    """
    common = {
        "vocab_size": len(words),
        "num_hidden_layers": 2,
        "max_position_embeddings": LENGTH,
        "hidden_act": "gelu",
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id,
    }
    first = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, **common))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=96, intermediate_size=192, num_attention_heads=3, projection_dim=96, **common)
    )
    for encoder in (first, second):
        for name, parameter in encoder.named_parameters():
            if "token_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.5)  # CLIP's 0.02 would make near-equal keys of all words
            elif "position_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return first, second
