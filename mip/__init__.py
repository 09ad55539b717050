"""Several subjects in one SDXL picture without mixing them up: the adapter, its training data and its evaluation.

    import mip
    pipe = mip.MIPAdapterXLPipeline.from_pretrained(...)

The public names load on first use, so that stages without a network do not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mip.model.adapter import MIPAdapter
    from mip.model.pipeline import MIPAdapterXLPipeline, Reference
    from mip.model.references import References

__all__ = ["MIPAdapter", "MIPAdapterXLPipeline", "Reference", "References"]

_MODULES = {
    "MIPAdapter": "mip.model.adapter",
    "MIPAdapterXLPipeline": "mip.model.pipeline",
    "Reference": "mip.model.pipeline",
    "References": "mip.model.references",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
