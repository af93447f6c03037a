"""Lets verl 0.9.1 train on machines without a GPU: a verl platform plug-in and the patches it needs.

verl loads this package in every process through `VERL_USE_EXTERNAL_MODULES=verl_cpu`; `VERL_PLATFORM=cpu` selects it
(both are set by `verl_cpu/env.sh`). No module here imports the recipe's, and none of the recipe's this;
of the recipe only scripts/env.sh and the doctor know where env.sh is.
"""

import os

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    from verl_cpu import patches, platform

    patches.install()
    __all__ = ["patches", "platform"]
