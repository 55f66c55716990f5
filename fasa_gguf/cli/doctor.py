"""The command `doctor`."""

from __future__ import annotations

import argparse
import json

from .arguments import AddCommand, add_model, whole
from .progress import progress_bar


def cmd_doctor(a: argparse.Namespace) -> int:
    from ..doctor.checks import FAILED, run_checks
    from ..doctor.facts import facts
    from ..doctor.report import format_report, report_as_dict
    from ..session import quiet

    quiet()
    checks = run_checks(a.model, a.profile, a.threads, progress_bar())
    found = facts()
    print(json.dumps(report_as_dict(found, checks), indent=1) if a.json else format_report(found, checks))
    return int(any(c.status == FAILED for c in checks))


def add_commands(command: AddCommand) -> None:
    p = command(
        "doctor",
        cmd_doctor,
        "What a bug report needs: machine, build, a short self-test, dense speed. Exit status 1: a check failed.",
        "model.gguf",
    )
    add_model(p)
    p.set_defaults(needs_model=False)
    p.add_argument(
        "-t", "--threads", type=whole(0), default=0, help="CPU threads; 0: the physical cores that this process may use"
    )
    p.add_argument("--profile", help="a profile's JSON or GGUF file for MODEL")
    p.add_argument("--json", action="store_true", help="the same as JSON")
