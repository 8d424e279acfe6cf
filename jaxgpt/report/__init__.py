"""What came out of a run: report.html, report.json and the table at the end. A pure reader of run folders."""

from jaxgpt.report.figures import summary_table
from jaxgpt.report.page import write_report

__all__ = ["summary_table", "write_report"]
