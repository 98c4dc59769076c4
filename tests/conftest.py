"""Settings of JAX and Hypothesis for the whole suite; GPU tests are skipped, or get fresh inputs."""

import os
import secrets
from pathlib import Path

# As environment variables, set before jax is imported, so that processes started by tests share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # xdist workers share a GPU
os.environ.setdefault("KERNEL_SEED", str(secrets.randbelow(2**31)))  # and the inputs that kernels get there

import hypothesis
import jax
import jax.numpy as jnp
import pytest

# Compilation makes the first example slow, and a failure must come back in the next run.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_report_header(config):
    return f"inputs of GPU tests: KERNEL_SEED={os.environ['KERNEL_SEED']}"


@pytest.fixture
def kernel_seed(request):
    """Of a test's inputs: new in every session on a GPU, fixed where kernels are interpreted."""
    seed = int(os.environ["KERNEL_SEED"]) if request.node.get_closest_marker("gpu") else 0
    print(f"KERNEL_SEED={seed}")  # shown where the test fails
    return seed


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def guarded(monkeypatch):
    """Lets nothing cross between host and device while a segment's program runs; the strategies that have run so."""
    from specsa_jax.runtime import Runtime

    compiled, ran = Runtime.decode_program, set()

    def decode_program(runtime, strategy, *arguments, **options):
        program, seconds = compiled(runtime, strategy, *arguments, **options)
        text = program.func.as_text()
        assert "callback" not in text and "outfeed" not in text

        def run(params, state, sampling, steps):
            steps = jnp.asarray(steps)
            with jax.transfer_guard("disallow"):
                found = jax.block_until_ready(program(params, state, sampling, steps))
            ran.add(strategy)
            return found

        return run, seconds

    monkeypatch.setattr(Runtime, "decode_program", decode_program)
    return ran
