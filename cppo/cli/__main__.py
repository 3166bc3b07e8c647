"""`python -m cppo.cli`, for launchers that take a module: `torchrun -m cppo.cli train run.yaml`."""

import sys

from cppo.cli import main

sys.exit(main())
