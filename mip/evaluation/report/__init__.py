"""The report of a profile: report.md, report.html and pictures, from the files of the other stages."""

from mip.evaluation.report.page import write

__all__ = ["write"]
