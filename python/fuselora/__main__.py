"""``python -m fuselora`` is the ``fuselora`` command."""

import sys

from fuselora.cli import main

sys.exit(main())
