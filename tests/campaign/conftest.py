"""The campaign's table, after its tests."""

from __future__ import annotations

from typing import Any

TITLES = ("reader", "inputs", "accepted", "refused", "failed", "most s", "most MB")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)
    ]
    rows = [dict(report.user_properties).get("campaign") for report in reports]
    rows = sorted(row for row in rows if row)
    if not rows:
        return
    total = ["all", *(sum(row[column] for row in rows) for column in range(1, 5))]
    rows.append([*total, max(row[5] for row in rows), max(row[6] for row in rows)])
    terminalreporter.section("spoilt files")
    terminalreporter.write_line(f"{TITLES[0]:<20}" + "".join(f"{t:>10}" for t in TITLES[1:]))
    for name, *counts, seconds, megabytes in rows:
        cells = [*map(str, counts), f"{seconds:.1f}", str(megabytes)]
        terminalreporter.write_line(f"{name:<20}" + "".join(f"{cell:>10}" for cell in cells))
