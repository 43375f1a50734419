"""`python -m multibeta` is the command `multibeta`."""

import sys

from multibeta.cli import main

sys.exit(main())
