"""What is done for a GPU's compiler: its options, and company for a row that is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import random_params, tiny_model

from specsa_jax import model
from specsa_jax.compiling import FLOAT32, LOOPS, compiler_options
from specsa_jax.nsa.rows import STRICT_OPTIONS, in_company


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_a_cpu_gets_no_options():
    assert compiler_options(jnp.float32) is None and compiler_options(jnp.bfloat16, strict=True) is None


def test_a_gpu_gets_loops_in_graphs(gpu):
    assert compiler_options(jnp.bfloat16) == LOOPS
    assert compiler_options("bfloat16", loops=False) == {}
    assert compiler_options(jnp.bfloat16, strict=True) == LOOPS | STRICT_OPTIONS


def test_products_in_float32_are_left_to_the_library_on_a_gpu_but_in_class_strict(gpu):
    assert compiler_options(jnp.float32) == LOOPS | FLOAT32
    assert compiler_options("float32", loops=False) == FLOAT32
    assert compiler_options(jnp.float32, strict=True) == LOOPS | STRICT_OPTIONS


def test_xla_flags_have_precedence_but_not_over_class_strict(gpu, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=4")
    assert compiler_options(jnp.bfloat16) == {}
    assert compiler_options(jnp.bfloat16, strict=True) == STRICT_OPTIONS
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiler_options(jnp.float32) == LOOPS


@pytest.mark.parametrize("options", [LOOPS, STRICT_OPTIONS, FLOAT32])
def test_the_compiler_knows_the_options(options):
    assert jax.jit(lambda x: x + 1).lower(1.0).compile(options)(1.0) == 2.0


def test_a_row_that_is_alone_gets_company_on_a_gpu_and_the_same_result(gpu):
    seen = []

    def product(x, y):
        seen.append(x.shape)
        return x @ jnp.arange(12.0).reshape(4, 3), y + 1

    key = jax.random.key(0)
    for shape, wide in (((1, 1, 4), (1, 2, 4)), ((1, 3, 4), (1, 3, 4)), ((2, 1, 4), (2, 1, 4))):
        x, y = jax.random.normal(key, shape), jnp.ones(shape[:2])
        out, other = in_company(product, x, y)
        assert seen.pop() == wide
        expected = product(x, y)
        seen.pop()
        np.testing.assert_allclose(out, expected[0], rtol=1e-6)
        np.testing.assert_array_equal(other, expected[1])


def test_no_matrix_of_a_layer_is_multiplied_by_a_single_row_on_a_gpu(gpu):
    """Where one were, XLA would write the matrix' elementwise products."""
    config = tiny_model(layers=1)
    params = jax.tree.map(jnp.asarray, random_params(config, 0))
    layer = model.bind(config, params, jnp.float32).layers[0]

    def products(x):
        out = in_company(lambda x: layer.attn.project(x, jnp.zeros(x.shape[:2], jnp.int32)).query, x)
        return out, in_company(layer.mlp, x)

    text = jax.jit(products).lower(jnp.ones((1, 1, config.hidden))).compile().as_text()
    rows = [line.split("[")[1].split(",")[0] for line in text.splitlines() if " dot(" in line]
    assert rows and "1" not in rows
