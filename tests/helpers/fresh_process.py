"""Code in a Python process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(code, **environment):
    """Run code, with more environment variables if given, and return the ended process.

    Its working directory has no packages: the sources in the checkout's root would shadow the installed
    ones.
    """
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
