"""The toybox's tokenizer and its two text encoders: stock CLIP, with a vocabulary of a few hundred entries."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows each of our words as one token, and any other text as bytes."""
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", special_tokens=[START, END], show_progress=False, min_frequency=1
    )
    model.train_from_iterator(WORDS, trainer)
    found = model.get_vocab()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = sorted(
        (i, token) for token, i in found.items() if len(token.removesuffix("</w>")) > 1 and token not in (START, END)
    )
    merges = _merges(model)
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(token for _, token in merged), START, END]
    result = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=LENGTH)  # pyright: ignore[reportArgumentType]
    for word in WORDS:
        assert len(result(word).input_ids) == 3, f"{word!r} is not one token"
    return result


def _merges(model: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]  # pyright: ignore[reportReturnType]


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
