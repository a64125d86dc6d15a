"""What must be settled before any test imports numpy."""

import os
import sys

from streammerge import system

_settled = os.environ.get("OPENBLAS_CORETYPE")
system.settle_blas()
# Else merges in this process would not give the bytes of those by the command.
assert "numpy" not in sys.modules or os.environ.get("OPENBLAS_CORETYPE") == _settled, (
    "a plugin of pytest imported numpy; set OPENBLAS_CORETYPE=Haswell, or turn it off with -p no:"
)
