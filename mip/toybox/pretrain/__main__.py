"""Train the toybox's networks from nothing: `python -m mip.toybox.pretrain`, or `make toybox-base`."""

import logging
from pathlib import Path

from mip.toybox.pretrain.build import build

# Worker processes import the functions they run: those cannot stand in this module.
if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(Path("data/toybox/base"), Path(".work/toybox-base"))
