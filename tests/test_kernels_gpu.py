"""The specs of every kernel on a real GPU."""

import jax
import numpy as np
import pytest

from pallas_kernels.selection import SelectionConfig, reference, select_blocks, specs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("spec", specs.TESTS, ids=lambda spec: spec.name)
def test_selection_equals_reference(spec, implementation):
    arguments = spec.arguments()
    expected = reference.select_blocks(*arguments, **spec.counts)
    select = jax.jit(lambda *arguments: select_blocks(*arguments, **spec.counts, implementation=implementation))
    select = select.lower(*arguments).compile()
    arguments = jax.device_put(arguments)
    # Freed just before the call, so its output is likely to lie in the poisoned memory.
    jax.block_until_ready(jax.device_put(np.full(expected.shape, 123456789, np.int32))).delete()
    np.testing.assert_array_equal(select(*arguments), expected)


@pytest.mark.parametrize("spec", specs.BENCHMARKS[::4], ids=lambda spec: spec.name)
def test_selection_of_every_config(spec):
    arguments = spec.arguments()
    expected = reference.select_blocks(*arguments, **spec.counts)
    for config in SelectionConfig.search_space(spec.rows, spec.shape[-1]):
        result = jax.jit(lambda *arguments, config=config: select_blocks(*arguments, **spec.counts, config=config))
        np.testing.assert_array_equal(result(*arguments), expected, err_msg=str(config))
