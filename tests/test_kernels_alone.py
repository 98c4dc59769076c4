"""``pallas_kernels`` without the rest of the project."""

import subprocess
import sys

IMPORTS = """
import importlib, pkgutil, sys
for name in "specsa_jax flax optax orbax tokenizers safetensors typer rich matplotlib".split():
    sys.modules[name] = None  # importing it raises ImportError
import pallas_kernels
for module in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
    importlib.import_module(module.name)
print(module.name)
"""


def test_every_module_is_imported_where_only_jax_is_installed():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "pallas_kernels.tuned\n"  # the last of them
