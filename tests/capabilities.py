"""What the tests found each policy family to do, written down for docs/policies.md."""

import json
from pathlib import Path
from typing import Any

import pytest


class CapabilityRecorder:
    """Collects the outcomes of tests marked `capability`, also from the workers of pytest-xdist.

    Args:
        path: JSON file: {family: {capability: {"passed", "failed", and what the tests recorded}}}.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one outcome; `works: false` is a test that saw the family refuse."""
        properties = dict(report.user_properties)
        if report.when != "call" or "capability" not in properties or report.skipped:
            return
        family, capability = properties.pop("capability")
        entry = self._found.setdefault(family, {}).setdefault(capability, {"passed": 0, "failed": 0})
        entry["passed" if report.passed else "failed"] += 1
        entry |= properties

    def pytest_sessionfinish(self) -> None:
        """Write the file, families and capabilities sorted."""
        ordered = {family: dict(sorted(found.items())) for family, found in sorted(self._found.items())}
        self._path.write_text(json.dumps(ordered, indent=1) + "\n")
