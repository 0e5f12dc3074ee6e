"""``python -m fastalign``, and what the launchers start."""

import sys

from fastalign.cli import main

sys.exit(main())
