"""Selection against its NumPy reference: the kernel in interpret mode, and plain JAX."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import UnsupportedError, _dispatch, select_blocks
from pallas_kernels.selection import SelectionConfig, reference, specs, unsupported

KERNEL = dict(implementation="pallas", interpret=True)
XLA = dict(implementation="xla")
COUNTS = dict(select_block=64, num_selected=4, num_initial=1, num_local=2)
either = pytest.mark.parametrize("implementation", [KERNEL, XLA], ids=["pallas", "xla"])


# Interpret mode fills outputs with the least int32 before the kernel runs.
@either
@pytest.mark.parametrize("spec", specs.TESTS, ids=lambda spec: spec.name)
def test_equals_reference(spec, implementation):
    arguments = spec.arguments()
    expected = reference.select_blocks(*arguments, **spec.counts)
    result = jax.jit(lambda *arguments: select_blocks(*arguments, **spec.counts, **implementation))(*arguments)
    assert result.dtype == jnp.int32
    np.testing.assert_array_equal(result, expected)


@st.composite
def calls(draw):
    num_initial, num_local = draw(st.sampled_from([(1, 2), (0, 1), (2, 3)]))
    counts = dict(select_block=16, num_selected=8, num_initial=num_initial, num_local=num_local)
    # Equal values, and values that differ in the last bit only.
    one = np.float32(1)
    values = st.sampled_from([0.0, -0.0, 1e-30, 0.25, one, np.nextafter(one, 2, dtype=np.float32), 3e38, np.inf])
    importance = draw(st.lists(values, min_size=40, max_size=40))
    return np.array(importance, np.float32), np.int32(draw(st.integers(-20, 40 * 16 + 20))), counts


@either
@given(call=calls())
def test_ties(implementation, call):
    importance, position, counts = call
    result = _select(importance, position, **counts, **implementation)
    np.testing.assert_array_equal(result, reference.select_blocks(importance, position, **counts))


_select = jax.jit(
    select_blocks,
    static_argnames=("select_block", "num_selected", "num_initial", "num_local", "implementation", "interpret"),
)


@pytest.mark.parametrize(
    "importance, position, expected",
    [
        ([0.1, 0.5, 0.2, 0.3, 0.0, 0.0], 5, [0, 1, 4, 5]),  # 0, 4 and 5 are forced, 1 is the best of the rest
        ([0.1, 0.2, 0.2, 0.2, 0.0, 0.0], 5, [0, 1, 4, 5]),  # ties to the lower id
        ([0.1, 0.5, 0.2, 0.9, 0.9, 0.9], 2, [0, 1, 2, -1]),  # later blocks do not exist yet
        ([0.1, 0.5, 0.2, 0.9, 0.9, 0.9], 0, [0, -1, -1, -1]),
    ],
)
def test_reference_by_hand(importance, position, expected):
    counts = COUNTS | dict(select_block=1)
    result = reference.select_blocks(np.float32(importance), np.int32(position), **counts)
    assert result.tolist() == expected


def test_search_space_holds_the_heuristic():
    for num_blocks in (1, 33, 256, 1024, 4096, 2**14):
        assert SelectionConfig.heuristic(8, num_blocks) in SelectionConfig.search_space(8, num_blocks)


@either
def test_under_transformations(implementation):
    importance, positions = specs.SelectionSpec("", (3, 5, 40), (0, 2559)).arguments()

    def select(importance, positions):
        return select_blocks(importance, positions, **COUNTS, **implementation)

    expected = reference.select_blocks(importance, positions, **COUNTS)
    np.testing.assert_array_equal(jax.vmap(select)(importance, positions), expected)
    gradient = jax.grad(lambda x: (x * (select(x, positions)[..., :1] >= 0)).sum())(jnp.asarray(importance))
    np.testing.assert_array_equal(gradient, 1)


@pytest.mark.parametrize(
    "importance, positions, counts, message",
    [
        (jnp.zeros((2, 8), jnp.bfloat16), jnp.zeros(2, jnp.int32), {}, r"importance: got bfloat16 \(2, 8\)"),
        (jnp.zeros((2, 0)), jnp.zeros(2, jnp.int32), {}, r"importance: got float32 \(2, 0\)"),
        (jnp.zeros(()), jnp.zeros((), jnp.int32), {}, r"importance: got float32 \(\)"),
        (jnp.zeros((2, 8)), jnp.zeros(2), {}, r"positions: got float32 \(2,\)"),
        (jnp.zeros((2, 8)), jnp.zeros(3, jnp.int32), {}, r"positions: got int32 \(3,\), .* broadcasts to \(2,\)"),
        (jnp.zeros((2, 8)), jnp.zeros((1, 2), jnp.int32), {}, r"positions: got int32 \(1, 2\)"),
        (jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), dict(select_block=0), "select_block: got 0, expected at least 1"),
        (jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), dict(num_selected=2), "num_selected: got 2, expected at least 3"),
        (jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), dict(num_local=-1), "num_local: got -1, expected at least 0"),
        (jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), dict(num_initial=True), "num_initial: got True, expected a whole"),
        (jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), dict(implementation="cuda"), "implementation: got 'cuda'"),
    ],
)
def test_errors(importance, positions, counts, message):
    with pytest.raises(ValueError, match=message):
        select_blocks(importance, positions, **(COUNTS | counts))


@either
def test_counts_are_whole_numbers_and_numpys_are_taken(implementation):
    importance, position = jnp.zeros((1, 8)), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="select_blocks: num_selected: got 4.0, expected a whole number"):
        select_blocks(importance, position, **(COUNTS | dict(num_selected=4.0)), **implementation)
    numpys = {name: np.int64(count) for name, count in COUNTS.items()}
    for counts in (COUNTS, numpys):
        assert select_blocks(importance, position, **counts, **implementation).tolist() == [[0, -1, -1, -1]]


def test_configs():
    for warps in (0, -7, 3, 64, 4.0):
        with pytest.raises(ValueError, match=f"num_warps: got {warps}, expected a"):
            SelectionConfig(warps)


def test_unsupported_shape():
    importance, position = jnp.zeros((1, 2**14 + 1)), jnp.zeros(1, jnp.int32)
    message = "importance: got 16385 blocks, expected at most 16384"
    assert unsupported(2**14 + 1, 4) == message
    with pytest.raises(UnsupportedError, match=f"select_blocks: implementation 'pallas': {message}"):
        select_blocks(importance, position, **COUNTS, **KERNEL)
    assert select_blocks(importance, position, **COUNTS).tolist() == [[0, -1, -1, -1]]


def test_unsupported_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, reason in [
        ("7.5", "device: got compute capability 7.5, expected at least 8.0, which Triton needs"),
        ("9.0", None),
        ("12.1", None),
        ("gfx942", None),
    ]:
        devices = [SimpleNamespace(compute_capability=capability)]
        monkeypatch.setattr(jax, "local_devices", lambda backend, devices=devices: devices)
        assert unsupported(8, 4) == reason
        # What holds PTX runs on NVIDIA's alone.
        foreign = "device: got gfx942, expected a GPU of NVIDIA's, whose instructions (PTX) the kernels hold"
        assert _dispatch.device_limit(ptx=True) == (reason or (foreign if capability == "gfx942" else None))
        chosen = _dispatch.choose("attention", None, None, interpret=False, ptx=True)
        assert chosen == ("pallas" if capability in ("9.0", "12.1") else "xla")


def test_unsupported_device():
    with jax.default_device(jax.devices("cpu")[0]):
        assert unsupported(8, 4) == "device: got cpu, expected a GPU (or interpret=True)"
        with pytest.raises(UnsupportedError, match="device: got cpu"):
            select_blocks(jnp.zeros((1, 8)), jnp.zeros(1, jnp.int32), **COUNTS, implementation="pallas")
        assert select_blocks(jnp.zeros((1, 8)), jnp.zeros(1, jnp.int32), **COUNTS).tolist() == [[0, -1, -1, -1]]
