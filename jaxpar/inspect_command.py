"""`jaxpar inspect`: what a step of the user's own, or of a ready model, will do on a mesh, here or on a target."""

import argparse
import json
import sys

from rich.console import Console

import jaxpar
from jaxpar.user_module import make_mesh, run_step


def inspect(options: argparse.Namespace) -> int:
    """Returns 0 once the report is printed; 1 if the step does not fit its target.

    Raises:
      UsageError: the options, or the module, can't be.
    """
    report: jaxpar.Inspection = run_step(options, make_mesh(options, options.target), jaxpar.inspect)
    if options.json:
        print(json.dumps(report.to_dict()))
    elif sys.stdout.isatty():
        Console().print(report)
    else:
        # Tables would wrap at a width that a file doesn't have.
        print(report)
    return 1 if report.fits is False else 0
