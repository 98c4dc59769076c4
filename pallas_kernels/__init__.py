"""Pallas kernels for sparse verification. They know nothing of models and import nothing but JAX and NumPy.

A folder per operation: the public function, a NumPy reference, one file per implementation, the tuning space, and the
named argument specs that tests and benchmarks share.
"""

from pallas_kernels._dispatch import Implementation as Implementation
from pallas_kernels._dispatch import UnsupportedError as UnsupportedError
from pallas_kernels._dispatch import choose as choose
from pallas_kernels.selection import select_blocks as select_blocks
