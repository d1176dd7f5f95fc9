"""What libraries below write about themselves, turned off; for programs alone, a library leaves logging as it is.

bitsandbytes warns while it is imported, on some CPUs at every start, and then for every call of an 8-bit layer. So this
module comes before all others that may import it, and importing it is what silences that logger.
"""

from __future__ import annotations

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turn off progress bars and notes of deprecation."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
