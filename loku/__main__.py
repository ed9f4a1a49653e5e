"""``python -m loku``: the ``loku`` command."""

import sys

from loku.cli import main

sys.exit(main())
