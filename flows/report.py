"""report: everything -> report.md, report.html, figures/."""

from prefect import flow

from flows.stage import run_stage
from mip.config import METHODS, Paths, Profile
from mip.data.parts import count_rows
from tasks.report import write_report


@flow
def report(name: str, profile: Profile) -> int:
    """Write the report of a profile."""
    write_report(profile.report, name=name, profile=profile)
    return sum(count_rows(Paths(name).images / method / "images.parquet") for method in METHODS)


if __name__ == "__main__":
    run_stage(report)
