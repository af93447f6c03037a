"""Python imports this first in a process that has the folder on its PYTHONPATH."""

import os
import traceback

try:
    import pretend  # noqa: F401
except BaseException:  # of which Python would make a warning, and go on without the device
    traceback.print_exc()
    os._exit(1)
