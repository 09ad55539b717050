"""`make experiment`: the profile that is examined, then the experiment's own stages, with one Prefect server."""

import sys

from flows import ROOT
from flows.experiment import plan
from flows.repro import PARAMETERS, active, dvc_repro, server
from mip.config import Paths
from mip.errors import MipError


def main() -> int:
    """The exit code is DVC's, or 2 for parameters that cannot be."""
    try:
        name, chosen = plan()
        with active(chosen.experiment.profile, file=PARAMETERS), server(ROOT / ".prefect") as url:
            code = dvc_repro("experiment/dvc.yaml", url=url)
    except MipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if code == 0:
        print(f"summary: {(Paths(name).reports / 'summary' / 'experiment.md').resolve()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
