"""The toybox's networks from nothing, in order, with every number that decides them.

Every step that is done is skipped, and the long one resumes, so the command can be stopped and started at will. Thread
and process counts are fixed: the bytes of the result do not depend on the machine's load.
"""

# diffusers annotates its constructors and outputs more narrowly than it behaves, and exports lazily.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false, reportCallIssue=false

import logging
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPVisionModelWithProjection

from mip.tables import file_hash, write_json
from mip.toybox.pretrain import autoencoder, denoiser, plain_adapter, vision
from mip.toybox.pretrain.portraits import portraits
from mip.toybox.pretrain.scenery import Scenery, scenery
from mip.toybox.pretrain.workers import Workers, run

log = logging.getLogger(__name__)

# Every number that decides the weights.
SCENES = {"seed": 1, "count": 40_000}
HELD_OUT = {"seed": 2, "count": 500, "split": "benchmark"}
SINGLES = {"seed": 5, "count": 20_000, "shares": (1.0,)}  # one object each, for the plain adapter
PORTRAITS = {"seed": 3, "count": 30_000}
MORE_PORTRAITS = {"seed": 3, "count": 60_000}  # for the image encoder: what it misreads, no adapter can draw
AUTOENCODER = {"seed": 11, "steps": 1600, "batch": 24}
# Each round starts from the files of the one before: a machine without time for the whole can stop between two.
BASE = (
    {"seed": 21, "steps": 2400, "batch": 96, "lr": 2.5e-3, "grounding": 0.2},
    {"seed": 23, "steps": 1000, "batch": 96, "lr": 1.5e-3, "grounding": 0.2},
)
VISION = {
    "image_encoder": {"seed": 31, "steps": 3000, "batch": 96},
    "open_clip": {"seed": 32, "steps": 600, "batch": 96},
    "dino": {"seed": 33, "steps": 300, "batch": 96},
    "appearance": {"seed": 34, "steps": 1500, "batch": 96},
    "detector": {"seed": 35, "steps": 1500, "batch": 16},
}
ADAPTERS = (
    {
        "sdxl": {"seed": 41, "steps": 1500, "batch": 96, "lr": 2e-3},
        "sdxl_plus": {"seed": 42, "steps": 400, "batch": 96, "lr": 2e-3},
    },
    {
        "sdxl": {"seed": 43, "steps": 600, "batch": 96, "lr": 1e-3},
        "sdxl_plus": {"seed": 44, "steps": 200, "batch": 96, "lr": 1e-3},
    },
)
FILES = {"sdxl": "ip-adapter_toybox.safetensors", "sdxl_plus": "ip-adapter-plus_toybox.safetensors"}
PROCESSES = 2


def _scenes(work: Path) -> Scenery:
    return scenery(work / "scenes", **SCENES)


def _portraits_of(name: str) -> dict[str, int]:
    return MORE_PORTRAITS if name == "image_encoder" else PORTRAITS


def _autoencoder(work: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(PROCESSES)
    held_out = scenery(work / "scenes", **HELD_OUT)
    autoencoder.train(_scenes(work), held_out, work / "vae", **AUTOENCODER)


def _vae(work: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / "vae", torch_dtype=torch.float32).eval()


def _round(work: Path, number: int) -> Path:
    """Where the pipeline and the adapters of a round lie."""
    return work / f"round-{number}"


def _base(workers: Workers, work: Path, number: int) -> None:
    vae, out = _vae(work), _round(work, number)
    start = _round(work, number - 1) / "pipeline" if number else None
    files = {"state": out / "base.state", "start": start}
    trained = denoiser.train(_scenes(work), vae, work, workers=workers, **files, **BASE[number])
    if workers.rank == 0:
        note = {"base": BASE[: number + 1], "autoencoder": AUTOENCODER, "scenes": SCENES}
        denoiser.save(trained, vae, out / "pipeline", note)


def _vision(name: str, work: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    settings, out = VISION[name], work / name
    if name == "open_clip":
        vision.clip(portraits(work / "scenes", **PORTRAITS), _scenes(work), out, **settings)
    elif name == "detector":
        vision.detector(_scenes(work), out, **settings)
    else:
        of_portraits = {"image_encoder": vision.image_encoder, "dino": vision.dino, "appearance": vision.appearance}
        source = portraits(work / "scenes", **_portraits_of(name))
        of_portraits[name](source, out, **settings)


def _adapter(workers: Workers, work: Path, number: int, variant: str) -> None:
    out = _round(work, number)
    pipe = StableDiffusionXLPipeline.from_pretrained(out / "pipeline", torch_dtype=torch.float32)
    encoder = CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder", dtype=torch.float32).eval()
    singles = scenery(work / "scenes", **SINGLES)
    latent_NCHW = np.load(work / "singles.npy", mmap_mode="r")
    place = Path("ip_adapter", FILES[variant])
    files = {"out": out / place, "start": _round(work, number - 1) / place if number else None}
    settings = ADAPTERS[number][variant]
    plain_adapter.train(pipe, encoder, singles, latent_NCHW, variant=variant, workers=workers, **files, **settings)


def _single_latents(work: Path) -> None:
    denoiser.latents(_vae(work), scenery(work / "scenes", **SINGLES), work / "singles.npy")


def _in_a_process(function: partial[None]) -> None:
    """Fork-free: a network starts from a clean interpreter, whatever ran before."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.func.__name__}{function.args} ended with exit code {process.exitcode}")


def build(out: Path, work: Path) -> None:
    """Train what is missing in `work`, then put everything into `out` with a list of hashes."""
    work.mkdir(parents=True, exist_ok=True)
    _scenes(work)
    for count_of in (PORTRAITS, MORE_PORTRAITS):
        portraits(work / "scenes", **count_of)
    for others in (SINGLES, HELD_OUT):
        scenery(work / "scenes", **others)
    if not (work / "vae" / "config.json").exists():
        _in_a_process(partial(_autoencoder, work))
    missing = [name for name in VISION if not (work / name).exists()]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in pool.map(partial(_vision, work=work), missing):  # each in one thread
            pass
    _in_a_process(partial(_single_latents, work))
    together = partial(run, count=PROCESSES, rendezvous=work / "rendezvous")
    for number in range(len(BASE)):
        _round(work, number).mkdir(exist_ok=True)
        if not (_round(work, number) / "pipeline" / "training.json").exists():
            together(partial(_base, work=work, number=number))
        for variant, file in FILES.items():
            if not (_round(work, number) / "ip_adapter" / file).exists():
                together(partial(_adapter, work=work, number=number, variant=variant))
    last = _round(work, len(BASE) - 1)
    for source in (last / "pipeline", last / "ip_adapter", *(work / name for name in VISION)):
        shutil.rmtree(out / source.name, ignore_errors=True)
        shutil.copytree(source, out / source.name)
    hashes = {name: file_hash(out / name) for name in ("pipeline", "ip_adapter", *VISION)}
    settings = {
        "scenes": SCENES,
        "singles": SINGLES,
        "portraits": PORTRAITS,
        "more_portraits": MORE_PORTRAITS,
        "autoencoder": AUTOENCODER,
        "base": BASE,
        "vision": VISION,
        "adapters": ADAPTERS,
    }
    write_json(out / "made.json", {"sha256": hashes, "settings": settings, "torch": torch.__version__})
    log.info("the base is in %s, %.1f MB", out, sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e6)
