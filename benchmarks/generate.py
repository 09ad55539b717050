"""A whole generation: ours, the public code's order of operations, and diffusers' own IP-Adapter, in one run.

    python -m benchmarks.generate                                    # the embedded world's models, on this machine
    python -m benchmarks.generate --full-size --variant sdxl         # SDXL's size with random weights, on a GPU
    python -m benchmarks.generate --full-size --variant sdxl --compile

prints a table for benchmarks/RESULTS.md. All draw the same number of steps from the same noise and decode nothing: what
differs is the attention. "As in the public code" builds every score matrix, in self-attention too. "IP-Adapter of
diffusers" attends to as many image tokens, all references in one softmax. Encoding the photos counts in all three.
Rounds alternate between them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTokenizer, CLIPVisionModelWithProjection

from benchmarks import full_size
from mip.model.adapter import Arithmetic, MIPAdapter
from mip.model.pipeline import MIPAdapterXLPipeline, Reference

BASE = "data/toybox/base"
NAMES = ("ball", "cup", "fish", "car", "star", "heart", "house", "tree")
Draw = Callable[[], Tensor]


def toy_tokenizer() -> CLIPTokenizer:
    """The embedded world's, at SDXL's length: the names keep their tokens."""
    return CLIPTokenizer.from_pretrained(f"{BASE}/pipeline/tokenizer", model_max_length=77)


def drawn(pipe: MIPAdapterXLPipeline, *, references: int, size: int, steps: int) -> Tensor:
    """Latents of one image with so many references, guidance on."""
    pipe.set_progress_bar_config(disable=True)
    given = [
        Reference(name, [Image.new("RGB", (224, 224), (30 * n, 99, 50))]) for n, name in enumerate(NAMES[:references])
    ]
    return pipe(references=given, scale=0.75, **_call(references, size, steps)).images


def _photos(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (224, 224), (30 * n, 99, 50)) for n in range(count)]


def _call(references: int, size: int, steps: int) -> dict[str, Any]:
    return {
        "prompt": " ".join(NAMES[:references]),
        "height": size,
        "width": size,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }


class Contenders:
    """Ways to draw the same with one pipeline; each installs what it needs before its turn and removes it after."""

    def __init__(self, pipe: MIPAdapterXLPipeline, adapter: MIPAdapter, setting: dict[str, int]) -> None:
        self.pipe, self.adapter, self.setting = pipe, adapter, setting

    def ours(self, arithmetic: Arithmetic) -> float:
        self.pipe.mip_adapter = self.adapter.install(self.pipe.unet, dtype=self.pipe.unet.dtype, arithmetic=arithmetic)
        try:
            return seconds(partial(drawn, self.pipe, **self.setting))
        finally:
            self.pipe.unload_mip_adapter()

    def compiled(self) -> float:
        """Ours with a compiled UNet. A step that had to be compiled again would be an error."""
        plain = self.pipe.unet.forward
        self.pipe.mip_adapter = self.adapter.install(self.pipe.unet, dtype=self.pipe.unet.dtype)
        self.pipe.unet.forward = torch.compile(plain)
        try:
            drawn(self.pipe, **self.setting)
            with torch.compiler.set_stance("fail_on_recompile"):
                return seconds(partial(drawn, self.pipe, **self.setting))
        finally:
            self.pipe.unet.forward = plain
            self.pipe.unload_mip_adapter()

    def base(self) -> float:
        return seconds(lambda: self.pipe(**_call(**self.setting)).images)

    def diffusers(self) -> float:
        """Its own IP-Adapter with the same weights, as one adapter of several images."""
        self.pipe.unet._load_ip_adapter_weights([_as_ip_adapter(self.adapter)])
        self.pipe.set_ip_adapter_scale(0.75)
        encoder: Any = self.pipe.image_encoder
        side = encoder.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.pipe.register_modules(feature_extractor=processor)
        photos = _photos(self.setting["references"])
        images: Any = [photos]  # one adapter, several images
        parent: Any = partial(StableDiffusionXLPipeline.__call__, self.pipe, ip_adapter_image=images)
        try:
            return seconds(lambda: parent(**_call(**self.setting)).images)
        finally:
            self.pipe.unload_ip_adapter()  # takes the encoder away too
            self.pipe.register_modules(image_encoder=encoder)


def _as_ip_adapter(adapter: MIPAdapter) -> dict[str, dict[str, Tensor]]:
    checkpoint = adapter.checkpoint()
    layers = {key: t for key, t in checkpoint.layers.items() if "text_to_weight" not in key}
    return {"image_proj": dict(checkpoint.image_proj), "ip_adapter": layers}


def seconds(draw: Draw) -> float:
    """Wall time of one generation. Raises where it has values that are not finite."""
    _synchronise()
    began = time.perf_counter()
    latents = draw()
    _synchronise()
    took = time.perf_counter() - began
    if not bool(latents.isfinite().all()):
        raise SystemExit("got latents that are not finite")
    return took


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(contenders: Contenders, *, rounds: int, compiles: bool) -> list[tuple[str, float, float]]:
    """Name, median seconds and peak GPU memory in MB of each; the first round of all is thrown away."""
    ways: dict[str, Callable[[], float]] = {
        "as in the public code": partial(contenders.ours, "official"),
        "ours": partial(contenders.ours, "fast"),
        "IP-Adapter of diffusers, as many tokens": contenders.diffusers,
        "no references": contenders.base,
    }
    if compiles:
        ways["ours, compiled"] = contenders.compiled
    times: dict[str, list[float]] = {name: [] for name in ways}
    memory = dict.fromkeys(ways, 0.0)
    for number in range(rounds + 1):
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            took = way()
            if number:
                times[name].append(took)
                memory[name] = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
    return [(name, statistics.median(of_name), memory[name]) for name, of_name in times.items()]


def table(rows: list[tuple[str, float, float]]) -> str:
    """Markdown; speeds against the public code's way."""
    literal = rows[0][1]
    lines = ["| | s an image | speed | peak memory, MB |", "|---|---|---|---|"]
    lines += [f"| {name} | {s:.2f} | {literal / s:.2f} | {f'{mb:.0f}' if mb else '-'} |" for name, s, mb in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="SDXL's size with random weights in half precision")
    parser.add_argument("--variant", default="sdxl", choices=("sdxl", "sdxl_plus"))
    parser.add_argument("--references", type=int, default=2)
    parser.add_argument("--size", type=int, help="side in pixels; else 1024, or the embedded world's 64")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.variant == "sdxl_plus" and not given.full_size:
        parser.error("diffusers does not read the embedded world's narrow 16-token adapter; use --full-size")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if given.full_size:
        dtype = torch.float16 if device == "cuda" else torch.bfloat16
        pipe = full_size.of_random_weights(given.variant, toy_tokenizer(), device=device, dtype=dtype)
        adapter = full_size.adapter(given.variant, pipe.unet).to(device)
    else:
        pipe = MIPAdapterXLPipeline.from_pretrained(f"{BASE}/pipeline", dtype=torch.float32)
        encoder = CLIPVisionModelWithProjection.from_pretrained(f"{BASE}/image_encoder", dtype=torch.float32)
        pipe.register_modules(image_encoder=encoder.eval())
        pipe.to(device)
        adapter = MIPAdapter.from_checkpoint(
            f"{BASE}/ip_adapter/ip-adapter_toybox.safetensors", pipe.unet, adds_gate=True
        )
    pipe.set_progress_bar_config(disable=True)
    size = given.size or (1024 if given.full_size else 64)
    contenders = Contenders(pipe, adapter, {"references": given.references, "size": size, "steps": given.steps})
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {machine}, {given.variant}, {given.references} references, {size} px")
    print(table(measure(contenders, rounds=given.rounds, compiles=given.compile)))


if __name__ == "__main__":
    main()
