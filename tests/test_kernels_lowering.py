"""Every kernel lowers for an H200 on a machine without a GPU: interpret mode accepts what Triton does not."""

from functools import partial

import pytest

from pallas_kernels import report
from pallas_kernels.selection import SelectionConfig, select_blocks, specs


@pytest.mark.parametrize("spec", [*specs.TESTS, *specs.BENCHMARKS], ids=lambda spec: spec.name)
def test_selection_lowers(spec):
    # Not by name: on a GPU "pallas" is what None stands for.
    lowered = report.lower(partial(select_blocks, **spec.counts), *spec.abstract())
    if spec.rows == 0:
        assert report.kernels(lowered) == []
        return
    assert "__gpu$xla.gpu.triton" in lowered.as_text()
    [kernel] = report.kernels(lowered)
    config = SelectionConfig.heuristic(spec.rows, spec.shape[-1])
    assert (kernel.name, kernel.grid, kernel.num_warps) == ("select_blocks_kernel", (spec.rows, 1, 1), config.num_warps)


def test_selection_compiles_for_sm90():
    pytest.importorskip("triton")
    for spec in specs.BENCHMARKS[-3:]:
        [kernel] = report.kernels(report.lower(partial(select_blocks, **spec.counts), *spec.abstract()))
        resources = report.compile_sm90(kernel)
        assert resources.stack == 0, f"{spec.name} spills: {resources}"
