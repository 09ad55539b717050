"""params.yaml as frozen classes: one class a stage, one block a profile, no defaults.

Values live in params.yaml and nowhere else. What differs between profiles are values, never code paths.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mip.errors import ConfigError

Checked = TypeVar("Checked", bound="Section")
Share = Annotated[float, Field(ge=0, le=1)]
BenchmarkKind = Literal["concept101", "dreambooth", "dreambooth-pairs", "own"]
STAGES = ("ingest", "extract", "construct", "score", "manifest", "features", "train", "generate", "evaluate", "report")
METHODS = ("base", "ip_adapter_concat", "ip_adapter_mean", "training_free", "mip")


class Section(BaseModel):
    """A block of parameters. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Engine(Section):
    """Where tasks run. Has no influence on any output."""

    runner: Literal["local", "dask"]
    workers: PositiveInt  # processes
    address: str | None  # of a Dask scheduler; null starts a cluster on this machine


class Models(Section):
    """The frozen networks. Each is a local folder or a hub id."""

    variant: Literal["sdxl", "sdxl_plus"]
    base: str  # diffusers SDXL pipeline
    image_encoder: str  # CLIPVisionModelWithProjection
    image_encoder_subfolder: str  # "" when the weights lie in the folder itself
    ip_adapter: str  # local file, or hub id
    ip_adapter_weight: str | None  # file inside the hub repository; null for a local file
    resolution: PositiveInt  # pixels, square
    dtype: Literal["float32", "float16", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]


class Ingest(Section):
    source: str  # name in the registry of sources
    options: Mapping[str, Any]  # checked by the source's own class
    benchmark: str | None  # a folder, or the file of an own benchmark; null takes the one that the source brings
    benchmark_kind: BenchmarkKind  # what lies there
    validation: str | None  # likewise, for the choice of scales
    validation_kind: BenchmarkKind
    benchmark_name: str
    prompts_per_combination: PositiveInt  # the first of each combination's prompts
    combinations: PositiveInt | None  # the first ones; null takes all
    validation_prompts_per_combination: PositiveInt
    validation_combinations: PositiveInt | None
    variant: Literal["official", "corrected"]  # of Concept101: as published, or with its known errors put right
    seed: NonNegativeInt  # of generation: one seed per task is derived from it


class Extract(Section):
    max_annotations: PositiveInt  # per image
    max_pixels: PositiveInt  # of an image; more is refused as a decompression bomb
    min_area: PositiveInt  # pixels of a mask


class OpenClip(Section):
    """An open_clip model by name and weights: ("ViT-B-32", "openai") or ("local-dir:PATH", null)."""

    name: str
    pretrained: str | None
    batch: PositiveInt  # images
    device: Literal["auto", "cpu", "cuda"]


class GivenLabels(Section):
    kind: Literal["given"]
    path: str | None  # folder of <shard>.labels.jsonl; null takes the one that the source brings


class OpenClipLabels(Section):
    kind: Literal["open_clip"]
    vocabulary: tuple[str, ...]
    template: str  # "a photo of a {}"
    model: OpenClip
    min_margin: NonNegativeFloat  # cosine of the best label less that of the second


class Rules(Section):
    """The authors' filter, with its constants (FORMATS of subject_dataset_10k)."""

    min_box_area: Share  # of the image; exclusive
    max_box_area: Share
    min_aspect: PositiveFloat  # width / height; exclusive
    max_aspect: PositiveFloat
    min_logit: float  # exclusive
    min_fill: Share  # of the box by the object's own mask
    max_containment: Share  # overlap / smaller box, with a box of higher logit; exclusive
    max_masks_in_box: PositiveInt
    label_in_caption: bool


class Construct(Section):
    labels: Annotated[GivenLabels | OpenClipLabels, Field(discriminator="kind")]
    rules: Rules
    min_objects: PositiveInt
    max_objects: PositiveInt  # the ones of highest logit
    distinct_names: bool


class Score(Section):
    model: OpenClip
    template: str  # of the text: "{}" is the bare class name
    weight: NonNegativeFloat  # lambda of the look-alike term


class Manifest(Section):
    threshold: float | None  # on the score; null keeps all
    top_k: PositiveInt | None  # the first ones; null keeps all
    order: Literal["score", "random"]  # who comes first: the best, or anyone (the control of an experiment)
    max_per_class_pair: PositiveInt | None
    duplicate_distance: NonNegativeInt  # bits between perceptual hashes, of 64; at most this far apart is a duplicate
    leak_distance: NonNegativeInt  # likewise, to a reference image of the benchmark
    validation_share: Share
    sheet: PositiveInt  # samples on a contact sheet
    seed: NonNegativeInt


Kind = Literal["latents", "images", "texts"]
KINDS: tuple[Kind, ...] = ("latents", "images", "texts")


def _distinct(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"got {list(kinds)}; give each kind once")
    return kinds


Kinds = Annotated[tuple[Kind, ...], AfterValidator(_distinct)]


class Features(Section):
    cache: Kinds  # what is encoded beforehand; training encodes the rest itself, at every step
    augmentations: PositiveInt  # crops and flips of each sample
    flip: Share  # probability that a reference is mirrored
    min_visible: Share  # of an object's pixels inside the crop; an object with less is absent from it
    batch: PositiveInt  # samples decoded ahead; the networks see one sample a call, so that no output depends on it
    shard: PositiveInt  # samples
    seed: NonNegativeInt


class Samples(Section):
    """Pictures of held-out samples, drawn during training; they have no influence on the weights."""

    every: PositiveInt  # optimizer steps
    count: PositiveInt  # samples
    steps: PositiveInt  # of denoising
    guidance: NonNegativeFloat
    scale: NonNegativeFloat  # of the references


class Train(Section):
    start: Literal["ip_adapter", "fresh"]
    merge: Literal["weighted", "concat"]
    gated: bool
    steps: PositiveInt  # optimizer steps
    batch: PositiveInt  # samples per optimizer step, over all devices
    micro_batch: PositiveInt  # samples that one device holds at a time; the gradients of several add up
    learning_rate: PositiveFloat
    warm_up: NonNegativeInt  # optimizer steps
    schedule: Literal["constant", "cosine"]
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit"]  # 8 bits: a GPU and the package bitsandbytes
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat | None
    drop_image: Share
    drop_text: Share
    drop_both: Share
    timesteps: tuple[Share, Share]  # drawn uniformly from this part of the schedule; [0, 1] is all of it
    snr_gamma: PositiveFloat | None  # min-SNR weighting of the loss; null weighs all noise levels alike
    noise_offset: NonNegativeFloat  # standard deviation of a shift of the noise, one a sample and channel
    ema: Annotated[float, Field(gt=0, lt=1)] | None  # decay of the weights' average a step; null averages nothing
    precision: Literal["no", "fp16", "bf16"]
    gradient_checkpointing: bool  # computes activations again in the backward pass instead of keeping them
    validation_every: PositiveInt  # optimizer steps
    validation_batches: PositiveInt
    samples: Samples | None  # null draws nothing
    checkpoint_every: PositiveInt  # optimizer steps
    checkpoint_minutes: PositiveFloat | None  # and whenever the last state is this old
    keep_checkpoints: PositiveInt
    on_bad_loss: Literal["stop", "skip"]  # skip goes on for ever; stop ends after `patience`
    patience: PositiveInt  # steps in a row without a finite loss
    trackers: tuple[str, ...]  # by accelerate's names: tensorboard, ...; each needs its package
    seed: NonNegativeInt


class Generate(Section):
    steps: PositiveInt  # of denoising
    guidance: NonNegativeFloat
    negative_prompt: str
    precision: Literal["no", "fp16", "bf16"]  # of the UNet's products; "no" is models.dtype
    scales: tuple[NonNegativeFloat, ...]  # tried on the validation tasks; a single one is taken as it is
    batch: PositiveInt  # images
    processes: PositiveInt  # share the batches: one a GPU
    maps: NonNegativeInt  # relevance maps are kept for this many of the benchmark's first tasks


class SegmentationDetector(Section):
    """A semantic segmentation model of transformers; every large and sure enough region is a detection."""

    kind: Literal["segmentation"]
    model: str
    threshold: Share  # mean probability of the region
    min_area: Share  # of the image


class ZeroShotDetector(Section):
    """A zero-shot object detector of transformers (OWLv2, Grounding DINO)."""

    kind: Literal["zero_shot"]
    model: str
    threshold: Share


class Evaluate(Section):
    clip: OpenClip  # CLIP-T and CLIP-I
    dino: str  # a ViT of transformers; its CLS token
    detector: Annotated[SegmentationDetector | ZeroShotDetector, Field(discriminator="kind")]
    appearance: str  # a ViT of transformers: the judge's embedding
    calibration: str | None  # scenes rendered right; null takes those that the source brings
    leak_threshold: float | None  # null computes it from the calibration scenes
    batch: PositiveInt
    bootstrap: PositiveInt  # draws
    device: Literal["auto", "cpu", "cuda"]
    seed: NonNegativeInt


class Report(Section):
    tasks: PositiveInt  # rows of the picture grid: the first prompt of each of the first combinations
    worst: PositiveInt  # cases shown by confusion


with warnings.catch_warnings():
    # A stage has one name everywhere; pydantic has a deprecated method of this one.
    warnings.filterwarnings("ignore", 'Field name "construct"', UserWarning)

    class Profile(Section):
        """Everything one profile sets."""

        engine: Engine
        models: Models
        ingest: Ingest
        extract: Extract
        construct: Construct  # pyright: ignore[reportIncompatibleMethodOverride]
        score: Score
        manifest: Manifest
        features: Features
        train: Train
        generate: Generate
        evaluate: Evaluate
        report: Report


class Paths:
    """Where a profile's files are. The same names stand in dvc.yaml; a test compares them."""

    def __init__(self, profile: str, root: Path = Path()) -> None:
        self.profile = profile
        self.data = root / "data" / profile
        self.reports = root / "reports" / profile
        self.index = self.data / "index"
        self.masks = self.data / "masks"
        self.samples = self.data / "samples"
        self.scores = self.data / "scores"
        self.manifest = self.data / "manifest"
        self.features = self.data / "features"
        self.adapter = self.data / "adapter"
        self.images = self.data / "images"  # one folder a method
        self.judge = self.data / "judge"  # features and detections by image hash, kept from run to run
        self.metrics = self.reports / "metrics.json"
        self.timings = self.data / "timings"
        self.work = root / ".work" / profile  # unfinished stages; safe to delete


def load_profile(file: Path, name: str | None = None) -> tuple[str, Profile]:
    """The active profile of params.yaml (or the named one), checked.

    Raises ConfigError, in one line, for a missing file, bad YAML, an unknown profile or an unknown, missing or wrong
    parameter.
    """
    content = read_yaml(file)
    known = [key for key in content if key != "profile"]
    active = name if name is not None else content.get("profile")
    if active not in known:
        raise ConfigError(f"{file}: got profile {active!r}; expected one of {', '.join(map(str, known))}")
    return str(active), checked(Profile, content[active], file=file, place=str(active))


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError."""
    try:
        content = YAML(typ="safe").load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no parameter file {file}; run from the project's root or name one") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {type(content).__name__}; expected a mapping of parameters")
    return content


def checked(kind: type[Checked], content: Any, *, file: Path, place: str) -> Checked:
    """A section from what the file holds at `place`. Raises ConfigError that names every wrong parameter."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, (place, *e['loc'])))}: {_said(dict(e))}" for e in error.errors())
        raise ConfigError(f"{file}: {problems}") from None


def _said(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown parameter, is it misspelt?"
    if error["type"] == "missing":
        return "missing"
    return f"got {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
