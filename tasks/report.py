"""report: everything becomes one page."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from mip.config import Paths, Profile, Report
from mip.evaluation import report


@task(cache_policy=NO_CACHE)
def write_report(config: Report, *, name: str, profile: Profile) -> Path:
    """Write report.md, report.html and figures/ of a profile."""
    return report.write(config, paths=Paths(name), profile=profile)
