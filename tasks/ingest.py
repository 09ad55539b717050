"""ingest: a source's images become an index."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Ingest
from mip.data import sources


@task(cache_policy=NO_CACHE)
def index_source(config: Ingest, *, out: Path, work: Path) -> Path:
    """Prepare the source and write its index and its benchmark to `out`."""
    return sources.ingest(config, out=out, work=work)
