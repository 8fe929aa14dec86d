"""`python -m negtome_fast.cli`, the same as `negtome-fast`."""

import sys

from . import main

sys.exit(main())
