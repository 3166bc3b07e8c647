"""`python -m cppo`, for launchers that take a module: `torchrun -m cppo train run.yaml`."""

import sys

from cppo.cli import main

sys.exit(main())
