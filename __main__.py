"""`python -m dream_fast` is the command `dream-fast`."""

import sys

from dream_fast.cli import main

sys.exit(main())
