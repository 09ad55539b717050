"""The frozen vision networks, each with a seed and a task of its own, none of which sees a held-out identity.

image_encoder   conditions the adapter    CLIP vision tower, contrastive with what an object is and wears
open_clip       labels, scores, CLIP-T/I  CLIP, contrastive with captions that do name colours and patterns
dino            the DINO slot             ViT, two views of one object against other objects, no labels
appearance      the judge's eye           ViT, cosines say how much palette and pattern two objects share, not the class
detector        the judge's finder        Segformer, which class is at each pixel
"""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mip.toybox.pretrain import text
from mip.toybox.pretrain.optimizer import optimizers, scheduled
from mip.toybox.pretrain.portraits import KIND, PATTERN, PRIMARY, SECONDARY, Portraits, cut_outs
from mip.toybox.pretrain.scenery import Scenery
from mip.toybox.scenes import CLASSES, COLOURS, PATTERNS, dress

log = logging.getLogger(__name__)

MEAN = STD = (0.5, 0.5, 0.5)
CONDITION_SIZE, EYE_SIZE, CLIP_SIZE, SCENE_SIZE = 48, 48, 64, 64
_WIDTH = 64  # of the embeddings
_KINDS_OF = (len(CLASSES), len(COLOURS), len(COLOURS), len(PATTERNS))  # values of each trait


def _tensor(picture_NHWC: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(picture_NHWC).permute(0, 3, 1, 2) * 2 - 1


def _fit(
    name: str, model: nn.Module, loss: Callable[[np.random.Generator], Tensor], *, seed: int, steps: int, lr: float
) -> None:
    """Minimise `loss(rng)` for so many steps."""
    torch.manual_seed(seed)
    chosen = optimizers(model, lr=lr)
    base = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    started, recent = time.monotonic(), []
    for step in range(steps):
        value = loss(np.random.default_rng([seed, step]))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip((g for o in chosen for g in o.param_groups), base, strict=True):
            group["lr"] = rate * scheduled(step, steps, warm_up=50)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(value.item())
        if step % 100 == 99 or step == steps - 1:
            log.info("%s step %d loss %.4f, %.1f s", name, step + 1, np.mean(recent), time.monotonic() - started)
            recent = []


def _contrast(a_ND: Tensor, b_ND: Tensor, scale: Tensor, same_NN: Tensor) -> Tensor:
    """Symmetric InfoNCE; pairs that are the same thing by chance (off the diagonal) do not count as negatives."""
    a_ND, b_ND = F.normalize(a_ND.float(), dim=-1), F.normalize(b_ND.float(), dim=-1)
    eye = torch.eye(len(a_ND), dtype=torch.bool)
    logits = (a_ND @ b_ND.T * scale.exp().clamp(max=50)).masked_fill(same_NN & ~eye, -1e4)
    target = torch.arange(len(a_ND))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Reading(nn.Module):
    """One linear reader per trait of an embedding: it keeps traits apart, so that new combinations of them are seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, kinds) for kinds in _KINDS_OF)

    def forward(self, seen_ND: Tensor, traits_NK: Tensor) -> Tensor:
        """Mean cross-entropy of the traits."""
        seen_ND = F.normalize(seen_ND.float(), dim=-1) * seen_ND.shape[-1] ** 0.5
        errors = [F.cross_entropy(head(seen_ND), traits_NK[:, k]) for k, head in enumerate(self.heads)]
        return torch.stack(errors).mean()


class Traits(nn.Module):
    """An embedding of what an object is and wears: the other tower of a contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 128) for n in _KINDS_OF)
        self.head = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, _WIDTH))

    def forward(self, traits_NK: Tensor) -> Tensor:
        parts = [table(traits_NK[:, k]) for k, table in enumerate(self.tables)]
        return self.head(torch.stack(parts).sum(dim=0))


def image_encoder(source: Portraits, out: Path, *, seed: int, steps: int, batch: int) -> None:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=CONDITION_SIZE,
        patch_size=8, projection_dim=_WIDTH, hidden_act="gelu",
    )  # fmt: skip
    tower, traits = CLIPVisionModelWithProjection(config), Traits()
    reading = Reading(_WIDTH)
    both = nn.ModuleDict({"tower": tower, "traits": traits, "reading": reading})
    both.register_parameter("scale", nn.Parameter(torch.tensor(2.3)))

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.choice(len(source), batch, replace=False)
        known = torch.from_numpy(source.traits_NK[rows]).long()
        seen = tower(_tensor(cut_outs(source, rows, rng, size=CONDITION_SIZE))).image_embeds
        same = (known[:, None] == known[None]).all(dim=-1)
        return _contrast(seen, traits(known), both.scale, same) + reading(seen, known)

    _fit("image_encoder", both, loss, seed=seed, steps=steps, lr=1.5e-3)
    tower.half().save_pretrained(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": CONDITION_SIZE},
        crop_size={"height": CONDITION_SIZE, "width": CONDITION_SIZE},
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(out)


def dino(source: Portraits, out: Path, *, seed: int, steps: int, batch: int) -> None:
    torch.manual_seed(seed)
    vit = _vit()
    head = nn.Sequential(nn.Linear(96, 192), nn.GELU(), nn.Linear(192, _WIDTH))
    parts = nn.ModuleDict({"vit": vit, "head": head})
    parts.register_parameter("scale", nn.Parameter(torch.tensor(2.3)))
    same = torch.eye(batch, dtype=torch.bool)  # no label is used: another crop of the same picture is the only positive

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.choice(len(source), batch, replace=False)
        first, second = (head(_look(vit, source, rows, rng)) for _ in range(2))
        return _contrast(first, second, parts.scale, same)

    _fit("dino", parts, loss, seed=seed, steps=steps, lr=1.5e-3)
    _save_vit(vit, out)


def appearance(source: Portraits, out: Path, *, seed: int, steps: int, batch: int) -> None:
    torch.manual_seed(seed)
    vit = _vit()

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.choice(len(source), batch, replace=False)
        picture_NHWC = cut_outs(source, rows, rng, size=EYE_SIZE, grounds=(1, 0, 0))  # the judge cuts out objects
        shares_NS = np.stack([palette(traits) for traits in source.traits_NK[rows]])
        # Half of them get the right side of their neighbour: colours must be read where they are, not known by heart.
        for n in np.flatnonzero(rng.random(batch) < 0.5):
            kept = rng.uniform(0.3, 0.7)
            edge = round(kept * EYE_SIZE)
            picture_NHWC[n, :, edge:] = picture_NHWC[n - 1, :, edge:]
            shares_NS[n] = kept * shares_NS[n] + (1 - kept) * shares_NS[n - 1]
        # The class token itself is compared, as the judge will compare it.
        seen_ND = F.normalize(vit(_tensor(picture_NHWC)).last_hidden_state[:, 0], dim=-1)
        wanted_NS = torch.from_numpy(shares_NS).float().sqrt()
        return F.mse_loss(seen_ND @ seen_ND.T, wanted_NS @ wanted_NS.T)

    _fit("appearance", vit, loss, seed=seed, steps=steps, lr=1.5e-3)
    _save_vit(vit, out)


def palette(traits_K: NDArray[np.int8]) -> NDArray[np.float64]:
    """Shares of an object's colours and, less, of its pattern; they add up to 1.

    The cosine of two square roots of these says how much two objects have in common. A contrast of identities would
    not do for a judge: it makes all different identities equally different, so that an object that has taken on one of
    another's colours looks no nearer to it.
    """
    _, first, second, pattern = (int(k) for k in traits_K)
    of_second = {"plain": 0.25, "stripes": 0.5, "dots": 0.35}[PATTERNS[pattern]]  # of the area, about
    shares = np.zeros(len(COLOURS) + len(PATTERNS))
    shares[first] += 0.9 * (1 - of_second)
    shares[second] += 0.9 * of_second
    shares[len(COLOURS) + pattern] = 0.1
    return shares


def _vit() -> ViTModel:
    config = ViTConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=EYE_SIZE,
        patch_size=8,
    )
    return ViTModel(config, add_pooling_layer=False)


def _look(vit: ViTModel, source: Portraits, rows: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
    return vit(_tensor(cut_outs(source, rows, rng, size=EYE_SIZE))).last_hidden_state[:, 0]


def _save_vit(vit: ViTModel, out: Path) -> None:
    vit.half().save_pretrained(out)
    processor = ViTImageProcessorPil(size={"height": EYE_SIZE, "width": EYE_SIZE}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(out)


def detector(scenes: Scenery, out: Path, *, seed: int, steps: int, batch: int) -> None:
    torch.manual_seed(seed)
    labels = {0: "background", **{i + 1: name for i, name in enumerate(CLASSES)}}
    config = SegformerConfig(
        num_labels=len(labels), id2label=labels, label2id={name: i for i, name in labels.items()}, depths=[2, 2, 2, 2],
        hidden_sizes=[24, 48, 80, 96], num_attention_heads=[1, 2, 4, 4], sr_ratios=[4, 2, 1, 1], strides=[2, 2, 2, 2],
        patch_sizes=[5, 3, 3, 3], decoder_hidden_size=96, mlp_ratios=[2, 2, 2, 2],
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)

    def loss(rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.choice(len(scenes), batch, replace=False))
        x = torch.from_numpy(np.array(scenes.image_NHWC[rows])).permute(0, 3, 1, 2).float() / 127.5 - 1
        names = np.concatenate([np.full((batch, 1), -1), scenes.names_NK[rows]], axis=1) + 1
        truth = torch.from_numpy(names[np.arange(batch)[:, None, None], np.array(scenes.owner_NHW[rows])])
        if rng.random() < 0.5:  # generated images are softer than rendered ones
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = x + torch.randn_like(x) * rng.uniform(0, 0.12)
        logits = F.interpolate(model(pixel_values=x).logits.float(), size=truth.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, truth.long())

    _fit("detector", model, loss, seed=seed, steps=steps, lr=1.5e-3)
    model.half().save_pretrained(out)
    SegformerImageProcessorPil(
        size={"height": SCENE_SIZE, "width": SCENE_SIZE}, image_mean=MEAN, image_std=STD, do_reduce_labels=False
    ).save_pretrained(out)


def clip(source: Portraits, scenes: Scenery, out: Path, *, seed: int, steps: int, batch: int) -> None:
    """An open_clip model in the layout that open_clip's "local-dir:" reads, with our tokenizer beside it."""
    torch.manual_seed(seed)
    words = text.tokenizer()
    model_config = {
        "embed_dim": _WIDTH,
        "vision_cfg": {"image_size": CLIP_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": text.LENGTH, "vocab_size": len(words), "width": 96, "heads": 3, "layers": 2,
            "hf_tokenizer_name": "tokenizer",
        },
    }  # fmt: skip
    network = {
        **model_config,
        "text_cfg": {k: v for k, v in model_config["text_cfg"].items() if k != "hf_tokenizer_name"},
    }
    model = open_clip.CLIP(**network)

    def loss(rng: np.random.Generator) -> Tensor:
        half = batch // 2
        alone = rng.choice(len(source), half, replace=False)
        together = np.sort(rng.choice(len(scenes), batch - half, replace=False))
        captions = [describe(traits, rng) for traits in source.traits_NK[alone]] + [
            scenes.captions[row] for row in together
        ]
        x = torch.cat(
            [
                _tensor(cut_outs(source, alone, rng, size=CLIP_SIZE)),
                _tensor(scenes.image_NHWC[together].astype(np.float32) / 255),
            ]
        )
        ids = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        same = torch.tensor([[a == b for b in captions] for a in captions])
        return _contrast(model.encode_image(x), model.encode_text(ids), model.logit_scale, same)

    _fit("open_clip", model, loss, seed=seed, steps=steps, lr=1.5e-3)
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": CLIP_SIZE, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (out / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}, indent=1) + "\n"
    )
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, out / "open_clip_model.safetensors")
    words.save_pretrained(out)


def describe(traits_K: NDArray[np.int8], rng: np.random.Generator) -> str:
    """A caption of a portrait: the class, mostly with colours and pattern."""
    name, colours = CLASSES[traits_K[KIND]], list(COLOURS)
    draw = rng.random()
    if draw < 0.35:
        return name if draw < 0.25 else f"a {name}"
    dressed = f"a {dress(name, colours[traits_K[PRIMARY]], colours[traits_K[SECONDARY]], PATTERNS[traits_K[PATTERN]])}"
    return dressed if draw < 0.85 else f"a photo of {dressed}"


def retrieval(model_out: Path, held_out: Portraits) -> float:
    """Share of cut-outs of held-out identities whose class the open_clip model in the folder ranks first."""
    model = open_clip.create_model(f"local-dir:{model_out}", load_weights=True)
    words = open_clip.get_tokenizer(f"local-dir:{model_out}")
    rng = np.random.default_rng(0)
    with torch.no_grad():
        names = F.normalize(model.eval().encode_text(words(list(CLASSES))), dim=-1)
        seen = F.normalize(model.encode_image(_tensor(cut_outs(held_out, np.arange(500), rng, size=CLIP_SIZE))), dim=-1)
    return float(((seen @ names.T).argmax(dim=1).numpy() == held_out.traits_NK[:500, KIND]).mean())
