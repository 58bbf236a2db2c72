"""The page beside a report: `report.html`, one file that needs nothing else, made from `report.json` alone."""

from featherweight.report.html import comparison, page, write

__all__ = ["comparison", "page", "write"]
