"""The report of a run, one page that stands alone, and several runs side by side.

Reading order: record (what the run's folder holds), words (numbers for people), curves and svg
(charts), texts (completions), page and comparison (the two pages).
"""

from cppo.report.comparison import write_comparison
from cppo.report.page import write_report
from cppo.report.record import ReportError, RunRecord, read_run

__all__ = ["ReportError", "RunRecord", "read_run", "write_comparison", "write_report"]
