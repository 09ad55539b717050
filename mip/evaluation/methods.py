"""The methods that are compared, by name: one table, no branches elsewhere.

All draw from the same noise; they differ in whose weights they use and how they merge the references.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mip.errors import ConfigError
from mip.model.references import Merge


@dataclass(frozen=True)
class Method:
    """How one method uses the references."""

    has_references: bool
    is_trained: bool  # our adapter's weights, else those of the plain IP-Adapter
    merge: Merge
    gated: bool | None  # None: as the weights have it
    oracle: bool = False  # the true masks take the place of the word maps; only where they are given

    @property
    def has_maps(self) -> bool:
        """Whether references are weighted by position, so that there is something to show."""
        return self.has_references and self.merge == "weighted"


METHODS: Mapping[str, Method] = {
    "base": Method(has_references=False, is_trained=False, merge="weighted", gated=None),
    "ip_adapter_concat": Method(has_references=True, is_trained=False, merge="concat", gated=False),
    "ip_adapter_mean": Method(has_references=True, is_trained=False, merge="mean", gated=False),
    # Plain weights have no gate; the paper's training-free mode takes f = 1.
    "training_free": Method(has_references=True, is_trained=False, merge="weighted", gated=False),
    "mip": Method(has_references=True, is_trained=True, merge="weighted", gated=None),
    # The experiment's controls: other training, and the best that any maps could do.
    "ip_adapter_trained": Method(has_references=True, is_trained=True, merge="concat", gated=False),
    "mip_unselected": Method(has_references=True, is_trained=True, merge="weighted", gated=None),
    "oracle": Method(has_references=True, is_trained=True, merge="weighted", gated=None, oracle=True),
}


def method_named(name: str) -> Method:
    """The method of that name. Raises ConfigError."""
    if name not in METHODS:
        raise ConfigError(f"got method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
