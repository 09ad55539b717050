"""`python -m mip.cli`, the same as `mip`."""

from mip.cli import main

main()
