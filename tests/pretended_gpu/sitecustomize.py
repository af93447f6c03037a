"""Python imports this first in a process that has the folder on its PYTHONPATH."""

import pretend  # noqa: F401
