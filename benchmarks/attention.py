"""One SDXL cross-attention layer: ours against the paper's formula written out, on one CPU thread or a GPU.

`python benchmarks/attention.py` prints a table for benchmarks/RESULTS.md. Both get the same weights and inputs and
agree in their result; keys and values of text and references are reused from step to step, the projections of the
queries and of the output are not.
Rounds alternate between the two, so that a busy machine disturbs both alike; CPU time is compared, not the wall's.

B batch   N references   R image tokens per reference   T text tokens   W name tokens   Q latent positions
H heads   D head width   C channels = H * D             E context width
"""

import argparse
import platform
import resource
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mip.model.attention import MIPAttnProcessor
from mip.model.references import ReferenceCache, References

B, N, R, T, W, Q, C, E, HEADS = 2, 2, 4, 77, 2, 1024, 1280, 2048, 20
Step = Callable[[], Tensor]


class Literal:
    """The formula, term by term: every score matrix is built, references one after the other."""

    def __init__(self, attn: Attention, processor: MIPAttnProcessor, text_BTE: Tensor, references: References) -> None:
        self.attn, self.processor, self.references = attn, processor, references
        assert attn.to_k is not None and attn.to_v is not None
        self.text = (self._heads(attn.to_k(text_BTE)), self._heads(attn.to_v(text_BTE)))
        self.images = [
            (self._heads(processor.to_k_ip(image_BRE)), self._heads(processor.to_v_ip(image_BRE)))
            for image_BRE in references.image_BNRE.unbind(1)
        ]
        self.names = [self._heads(attn.to_k(phrase_BTE)) for phrase_BTE in references.phrase_BNTE.unbind(1)]

    def __call__(self, hidden_BQC: Tensor) -> Tensor:
        q_BHQD = self._heads(self.attn.to_q(hidden_BQC))
        text_BQC = self._joined(self._attend(q_BHQD, *self.text))
        image_NBQC = [self._joined(self._attend(q_BHQD, k, v)) for k, v in self.images]
        maps_NBQ = []
        for n, k_BHTD in enumerate(self.names):
            attention_BHQT = (q_BHQD @ k_BHTD.mT / q_BHQD.shape[-1] ** 0.5).softmax(dim=2)
            words_BT = self.references.words_BNT[:, n].to(attention_BHQT.dtype)
            maps_NBQ.append((attention_BHQT.mean(dim=1) * words_BT[:, None]).sum(-1) / words_BT.sum(-1)[:, None])
        total_BQ = torch.stack(maps_NBQ).sum(0)
        gate_BQ = torch.sigmoid(self.processor.text_to_weight(text_BQC).squeeze(-1))  # pyright: ignore[reportOptionalCall]
        gate_BQ = gate_BQ / gate_BQ.mean(dim=-1, keepdim=True)
        merged_BQC = text_BQC
        for n, (image_BQC, map_BQ) in enumerate(zip(image_NBQC, maps_NBQ, strict=True)):
            scale_B = self.references.scale_BN[:, n, None, None]
            merged_BQC = merged_BQC + (gate_BQ * map_BQ / total_BQ)[..., None] * image_BQC * scale_B
        return self.attn.to_out[0](merged_BQC)  # pyright: ignore[reportOptionalSubscript]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    def _joined(self, x: Tensor) -> Tensor:
        return x.transpose(-3, -2).flatten(-2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def steps(device: str, dtype: torch.dtype) -> dict[str, Step]:
    """The two, ready to run; a call is one denoising step's work in the layer."""
    torch.manual_seed(0)
    attn = Attention(C, cross_attention_dim=E, heads=HEADS, dim_head=C // HEADS).to(device, dtype).requires_grad_(False)
    processor = MIPAttnProcessor("layer", context_width=E, channels=C, has_gate=True)
    processor.to(device, dtype).requires_grad_(False)
    words_BNT = torch.zeros(B, N, T, dtype=torch.bool)
    words_BNT[..., 1 : 1 + W] = True
    references = References(
        image_BNRE=torch.randn(B, N, R, E),
        phrase_BNTE=torch.randn(B, N, T, E),
        words_BNT=words_BNT,
        present_BN=torch.ones(B, N, dtype=torch.bool),
        scale_BN=torch.full((B, N), 0.75),
        latent_size=(64, 64),
    ).to(device, dtype)
    hidden_BQC, text_BTE = torch.randn(B, Q, C).to(device, dtype), torch.randn(B, T, E).to(device, dtype)
    cache = ReferenceCache(references)
    literal = Literal(attn, processor, text_BTE, references)
    return {
        "literal": lambda: literal(hidden_BQC),
        "ours": lambda: processor(attn, hidden_BQC, text_BTE, references=references, reference_cache=cache),
    }


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make, at their highest; what an operation uses inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def extra_memory(step: Step) -> float:
    """MB beyond the inputs at the peak of one step."""
    with PeakMemory() as memory:
        step()
    return memory.peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        both = steps(given.device, torch.float32)
        difference = float((both["ours"]() - both["literal"]()).abs().max())
        times = {name: [] for name in both}
        for _ in range(given.rounds):
            for name, step in both.items():
                times[name].append(_timed(step, given.device))
        memory = {name: extra_memory(step) for name, step in both.items()}
    seconds = {name: statistics.median(of_rounds) for name, of_rounds in times.items()}
    machine = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, one thread"
    print(f"torch {torch.__version__}, {machine}, largest difference {difference:.1e}")
    print("| | time of a step, ms | speed | extra memory, MB |\n|---|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1e3 * value:.1f} | {seconds['literal'] / value:.2f} | {memory[name]:.1f} |")


def _timed(step: Step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = resource.getrusage(resource.RUSAGE_SELF)
    step()
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


if __name__ == "__main__":
    main()
