"""What must be settled before any test imports numpy."""

from streammerge import system

system.settle_blas()
