"""The report of a trained model: one self-contained HTML page of figures and tables, and its numbers as JSON next to it."""

from multibeta.report.write import write_report

__all__ = ["write_report"]
