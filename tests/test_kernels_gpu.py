"""The specs of every kernel on a real GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attend
from pallas_kernels.attention import specs as attention_specs
from pallas_kernels.selection import SelectionConfig, reference, select_blocks, specs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("spec", specs.TESTS, ids=lambda spec: spec.name)
def test_selection_equals_reference(spec, implementation, kernel_seed):
    arguments = spec.arguments(kernel_seed)
    expected = reference.select_blocks(*arguments, **spec.counts)
    select = jax.jit(lambda *arguments: select_blocks(*arguments, **spec.counts, implementation=implementation))
    select = select.lower(*arguments).compile()
    arguments = jax.device_put(arguments)
    # Freed just before the call, so its output is likely to lie in the poisoned memory.
    jax.block_until_ready(jax.device_put(np.full(expected.shape, 123456789, np.int32))).delete()
    np.testing.assert_array_equal(select(*arguments), expected)


@pytest.mark.parametrize("spec", specs.BENCHMARKS[::4], ids=lambda spec: spec.name)
def test_selection_of_every_config(spec, kernel_seed):
    arguments = spec.arguments(kernel_seed)
    expected = reference.select_blocks(*arguments, **spec.counts)
    for config in SelectionConfig.search_space(spec.rows, spec.shape[-1]):
        result = jax.jit(lambda *arguments, config=config: select_blocks(*arguments, **spec.counts, config=config))
        np.testing.assert_array_equal(result(*arguments), expected, err_msg=str(config))


def test_attention_in_a_cache_of_more_than_2_31_elements(kernel_seed):
    spec = next(spec for spec in attention_specs.TESTS if spec.name == "D128-bf16")
    query, gates, layer, table, lengths, tail = spec.arguments(kernel_seed)
    function = jax.jit(lambda *arguments: attend(spec.sparsity, *arguments))
    expected, selection = function(query, gates, layer, table, lengths, tail)
    # The same pages at the end of a pool that 32-bit element offsets do not reach.
    pages, heads, page, dim = layer.key.shape
    before = 2**31 // (heads * page * dim) + 1
    pools = {}
    for name in ("key", "value", "compressed_key", "compressed_value"):
        pool = getattr(layer, name)
        pools[name] = jnp.full((before + pages, *pool.shape[1:]), jnp.nan, pool.dtype).at[before:].set(pool)
    assert pools["key"].size > 2**31
    out, again = function(query, gates, layer._replace(**pools), table + before, lengths, tail)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(again.ids, selection.ids)
