"""A step of training: ours on cached features, and a literal trainer that encodes everything at each step, in one run.

    python -m benchmarks.train_step                                  # the embedded world's models, on this machine
    python -m benchmarks.train_step --full-size --variant sdxl       # SDXL's size with random weights, on a GPU
    python -m benchmarks.train_step --full-size --variant sdxl_plus --peak-tflops 989

prints a table for benchmarks/RESULTS.md. "Literal" works as the public trainer does: a step encodes the pictures with
the VAE in float32, the objects with the image encoder, prompts and names with both text encoders, and its attention
builds every score matrix. Both have the same samples, precision, batch, frozen UNet and optimizer, and both read the
next step's samples in the background. Rounds alternate between them, so that a busy machine disturbs both alike.
Without a GPU both have one thread, and the CPU time of a step is compared, not the wall's.

`--full-size` writes the random networks to a temporary folder first: 15 GB of disk, or set TMPDIR.
"""

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import full_size
from benchmarks.attention import PeakMemory
from benchmarks.generate import NAMES, toy_tokenizer
from benchmarks.literal_trainer import Literal
from mip.config import Features, Models, Train, load_profile
from mip.data.images import encode_mask, mask_area, mask_box
from mip.model import official
from mip.model.checkpoint import save_adapter
from mip.tables import Row, write_table
from mip.training.features import encode
from mip.training.loop import _Run  # the trainer itself, step by step: `train` runs to the end

SAMPLES, OBJECTS = 32, 2
PAPER_SAMPLES = 12_000 * 32


class Trainer(Protocol):
    """Loads a step's samples in the background, and takes the step."""

    def load(self, step: int, /) -> Any: ...
    def step(self, samples: Any, /) -> object: ...


def random_rows(folder: Path, *, resolution: int) -> list[Row]:
    """Manifest rows with their pictures: a smooth noise and two rectangles, a third wider than they are high."""
    width, height = resolution * 4 // 3, resolution
    return [_random_row(folder, number, width=width, height=height) for number in range(SAMPLES)]


def _random_row(folder: Path, number: int, *, width: int, height: int) -> Row:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    objects = []
    for place in range(OBJECTS):
        mask = np.zeros((height, width), np.bool_)
        # Near the middle: no crop cuts much of them off.
        left = width * (3 + 2 * place) // 8
        mask[height // 4 : height * 3 // 4, left : left + width // 6] = True
        pixels[mask] = rng.integers(0, 256, 3)
        rle, label = encode_mask(mask), NAMES[(number + place) % len(NAMES)]
        box, area = (measure(rle, width=width, height=height) for measure in (mask_box, mask_area))
        thing = {"object_id": str(place), "label": label, "logit": 1.0, "margin": None}
        objects.append({**thing, "rle": rle, "box": box, "area": area})
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "JPEG", quality=90)
    path, data = folder / f"{number}.jpg", picture.getvalue()
    path.write_bytes(data)
    row: dict[str, Any] = dict.fromkeys(
        ("sample_id", "image_id", "shard", "source", "annotation_path", "phash", "models"), str(number)
    )
    row |= {"image_path": str(path), "image_offset": 0, "image_size": len(data), "width": width, "height": height}
    row |= {"caption": " and ".join(f"a {thing['label']}" for thing in objects), "objects": objects}
    row |= {"annotation_offset": 0, "annotation_size": 0, "text_image": [], "image_image": []}
    return row | {"score": 0.0, "rank": number, "weight": 1.0}


def random_networks(variant: str, folder: Path, *, models: Models, device: str) -> Models:
    """Write a pipeline, an image encoder and a plain IP-Adapter of SDXL's size; the same settings with their paths."""
    pipe = full_size.of_random_weights(variant, toy_tokenizer(), device=device, dtype=torch.float16)
    pipe.save_pretrained(folder / "base")
    checkpoint = full_size.adapter(variant, pipe.unet).checkpoint()
    gateless = {key: tensor for key, tensor in checkpoint.layers.items() if "text_to_weight" not in key}
    save_adapter(folder / "ip_adapter.safetensors", type(checkpoint)(checkpoint.image_proj, gateless, {}))
    places = {"base": str(folder / "base"), "image_encoder": str(folder / "base"), "ip_adapter_weight": None}
    more = {"image_encoder_subfolder": "image_encoder", "ip_adapter": str(folder / "ip_adapter.safetensors")}
    return models.model_copy(update={**places, **more})


@dataclass(frozen=True)
class Round:
    """Several steps of one trainer."""

    step_s: float  # wall
    cpu_s: float  # of a step, with the reading of samples
    wait_share: float

    @property
    def compared_s(self) -> float:
        return self.step_s if torch.cuda.is_available() else self.cpu_s


def timed(trainer: Trainer, *, steps: int) -> Round:
    """The samples of the first step are there when the clock starts."""
    waited = 0.0
    with ThreadPoolExecutor(1) as background:
        ahead = background.submit(trainer.load, 0)
        ahead.result()
        began, cpu_began = time.perf_counter(), time.process_time()
        for step in range(steps):
            asked = time.perf_counter()
            samples = ahead.result()
            waited += time.perf_counter() - asked
            ahead = background.submit(trainer.load, step + 1)
            trainer.step(samples)
        _synchronise()
        took, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return Round(took / steps, cpu / steps, waited / took)


def step_memory(trainer: Trainer) -> int:
    """Bytes beyond what the trainer holds, at the peak of one step."""
    samples = trainer.load(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(samples)
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        trainer.step(samples)
    return memory.peak


def held_memory(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and of the optimizer's moments."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def encoding_time(literal: Literal) -> float:
    """Seconds to encode one sample before training, CPU time where there is no GPU; the first one is thrown away."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for row in literal.rows[:9]:
        began = clock()
        literal.encode_once(row)
        _synchronise()
        times.append(clock() - began)
    return statistics.median(times[1:])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(literal: Literal, ours: _Run, *, rounds: int, steps: int) -> dict[str, tuple[Round, int]]:
    """Medians and bytes at the peak of each; the first round is thrown away."""
    trainers: dict[str, Trainer] = {"literal": literal, "ours": ours}
    seen: dict[str, list[Round]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            found = timed(trainer, steps=steps)
            if number:
                seen[name].append(found)
    encoders = literal.encoders
    frozen = [encoders.vae, encoders.image_encoder, *encoders.text_encoders]
    held = {
        "literal": held_memory([literal.unet, literal.adapter, *frozen], literal.optimizer),
        "ours": held_memory([ours.unet, ours.adapter], ours.optimizer),
    }
    return {
        name: (
            Round(*(statistics.median(column) for column in zip(*map(astuple, found), strict=True))),
            held[name] + step_memory(trainers[name]),
        )
        for name, found in seen.items()
    }


def table(measured: dict[str, tuple[Round, int]], *, batch: int) -> str:
    """Markdown; speeds against the literal trainer."""
    lines = ["| | a step, s | its CPU time, s | speed | samples/s | waiting for data | peak memory, MB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    slowest = measured["literal"][0].compared_s
    for name, (found, peak) in measured.items():
        cells = [name, f"{found.step_s:.2f}", f"{found.cpu_s:.2f}", f"{slowest / found.compared_s:.2f}"]
        cells += [f"{batch / found.step_s:.1f}", f"{found.wait_share:.1%}", f"{peak / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_a_gpu(trainer: Trainer, found: Round, *, batch: int, peak_tflops: float | None) -> str:
    """Arithmetic a second (products and convolutions, as executed), and the time of the paper's run."""
    samples = trainer.load(0)
    with FlopCounterMode(display=False) as counter:
        trainer.step(samples)
    rate = counter.get_total_flops() / found.step_s / 1e12
    used = f", {rate / peak_tflops:.0%} of {peak_tflops:.0f}" if peak_tflops else ""
    hours = PAPER_SAMPLES / batch * found.step_s / 3600
    return f"{rate:.0f} TFLOP/s{used}; 12,000 steps of 32 samples: {hours:.1f} hours on one GPU"


def run(config: Train, *, models: Models, cutting: Features, folder: Path, given: argparse.Namespace) -> None:
    """Encode the samples for ours, then measure both and print."""
    rows = random_rows(folder, resolution=models.resolution)
    for split, of_split in (("train", rows), ("val", [])):
        write_table(folder / "manifest" / f"{split}.parquet", "manifest", of_split, {})
    features = encode(
        cutting, models=models, manifest=folder / "manifest", out=folder / "features", work=folder / "encodings"
    )
    # The public code lets no gradient through the maps; the processor with its arithmetic was made for inference.
    with mock.patch.object(official, "_mass", torch.no_grad()(official._mass)):
        literal = Literal(config, models=models, rows=rows, cutting=cutting)
        ours = _Run(config, models=models, features=features, work=folder / "work")
        measured = measure(literal, ours, rounds=given.rounds, steps=given.steps)
    print(table(measured, batch=config.batch))
    once = encoding_time(literal)
    print(f"before training, once: {1e3 * once:.0f} ms to encode a sample")
    if ours.accelerator.device.type == "cuda":
        print(on_a_gpu(ours, measured["ours"][0], batch=config.batch, peak_tflops=given.peak_tflops))


def settings(profile: str, *, batch: int | None) -> tuple[Train, Models, Features]:
    """Those of params.yaml, without what a step does not need; one augmentation, no mirrored objects."""
    _, whole = load_profile(Path("params.yaml"), profile)
    size = batch or whole.train.batch
    # An average or checkpointed gradients would be ours alone.
    plain = {"batch": size, "micro_batch": size, "optimizer": "adamw", "ema": None, "gradient_checkpointing": False}
    cutting = whole.features.model_copy(update={"augmentations": 1, "flip": 0.0, "min_visible": 0.0})
    return whole.train.model_copy(update={**plain, "samples": None, "trackers": ()}), whole.models, cutting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="SDXL's size with random weights, 512 px; needs a GPU")
    parser.add_argument("--variant", default="sdxl", choices=("sdxl", "sdxl_plus"))
    parser.add_argument("--batch", type=int, help="samples; else 4, or the embedded world's 16")
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in half precision, dense, by its maker")
    given = parser.parse_args()
    if given.variant == "sdxl_plus" and not given.full_size:
        parser.error("the embedded world's networks here are of the variant sdxl; use --full-size")
    if given.full_size and not torch.cuda.is_available():
        parser.error("--full-size needs a GPU")
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # on a busy machine several wait for one another
    profile, batch = (given.variant, given.batch or 4) if given.full_size else ("toybox", given.batch)
    config, models, cutting = settings(profile, batch=batch)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if given.full_size:
            models = random_networks(given.variant, folder, models=models, device="cuda")
            torch.cuda.empty_cache()
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        size = f"{models.resolution} px, batch {config.batch}, {config.precision}"
        print(f"torch {torch.__version__}, {machine}, {given.variant}, {size}")
        run(config, models=models, cutting=cutting, folder=folder, given=given)


if __name__ == "__main__":
    main()
