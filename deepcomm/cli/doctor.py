# SPDX-License-Identifier: Apache-2.0
"""``deepcomm doctor``: what was found on this machine, and a remedy for each problem."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deepcomm.cli.checks import CHECKS
from deepcomm.cli.checks.finding import Finding, Status

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["add_parser", "examine"]

SECTION_WIDTH = 8
NAME_WIDTH = 20


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the sub-commands."""
    parser = commands.add_parser(
        "doctor",
        help="show what was found on this machine, with a remedy for each problem",
        description="Looks for what deepcomm uses. Ends with status 1 if something that it needs "
        "on this machine is broken; what is merely absent (a GPU, an extra) is no failure.",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    del argv
    findings = examine(CHECKS)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return int(any(finding.status is Status.FAIL for finding in findings))


def examine(checks: Sequence[tuple[str, Callable[[], Iterator[Finding]]]]) -> list[Finding]:
    """Run checks, each with its section; one that raises becomes a finding itself."""
    findings: list[Finding] = []
    for section, check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - doctor reports whatever is broken
            detail = f"the check itself failed: {error!r}"
            findings.append(Finding(section, check.__name__, Status.WARN, detail))
    return findings


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        section, name = finding.section.ljust(SECTION_WIDTH), finding.name.ljust(NAME_WIDTH)
        print(f"{finding.status.value.ljust(5)}{section}{name}{finding.detail}")
        if finding.remedy:
            print(f"{' ' * 5}remedy: {finding.remedy}")
    problems = [finding for finding in findings if finding.status is Status.FAIL]
    print(f"\n{len(problems)} broken, {sum(f.status is Status.WARN for f in findings)} to look at")
