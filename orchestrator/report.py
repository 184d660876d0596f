"""The report of a run, from its workspace alone: report/index.html, report/report.json and report/report.md."""

from typing import Any

from orchestrator.report_contents import contents
from orchestrator.report_page import page
from orchestrator.report_reading import read_run, without_nan
from orchestrator.report_slicing import is_sliced, slicing_tables
from orchestrator.report_text import markdown
from orchestrator.report_verdict import verdict
from shearing.storage import Store


def build_report(workspace: Store) -> dict[str, Any]:
    """Write the report of whatever the workspace holds, complete or not, and return its contents.

    The HTML page is one file that loads nothing; the JSON holds every number of it, series included.
    """
    run = read_run(workspace)
    report = without_nan(contents(run))
    report["recipe_text"] = run.recipe_text
    report["verdict"] = without_nan(verdict(report))
    tables = slicing_tables(report) if is_sliced(run.recipe) else None
    workspace.write_json("report/report.json", report)
    workspace.write_bytes("report/report.md", markdown(report, tables).encode())
    workspace.write_bytes("report/index.html", page(report).encode())
    return report
