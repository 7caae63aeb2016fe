"""``python -m kdcore``: the command line, for example under ``accelerate launch -m kdcore``."""

from __future__ import annotations

import sys

from kdcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
