"""φ by kernels against its NumPy reference: in interpret mode, on a GPU where there is one."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_params import tiny_nsa

from pallas_kernels import UnsupportedError, report, tuned
from pallas_kernels.compress import CompressConfig, compress, reference, specs
from specsa_jax import cache as caches
from specsa_jax.config import RopeConfig
from specsa_jax.nsa import cached, kernels
from specsa_jax.nsa.compression import Compress

PLACES = [
    pytest.param(True, id="interpret"),
    pytest.param(False, id="gpu", marks=pytest.mark.gpu),
]
# In the interpreter, whose programs take a second or two to compile: one of each kind.
INTERPRETED = ("tree-of-two-row-tiles", "linear-plain", "odd-sizes", "bfloat16-of-float32-weights")
RAGGED = next(spec for spec in specs.TESTS if spec.name == "ragged")
# A GPU takes every spec in both dtypes.
SPECS = [
    *[pytest.param(spec, True, id=f"{spec.name}-interpret") for spec in specs.TESTS if spec.name in INTERPRETED],
    *[pytest.param(dataclasses.replace(spec, dtype=dtype), False, id=f"{spec.name}-{dtype}-gpu", marks=pytest.mark.gpu)
      for spec in specs.TESTS for dtype in ("float32", "bfloat16")],
]  # fmt: skip


def compiled(arguments, interpret, config=None):
    """What runs the kernels; what nobody writes is NaN where they are interpreted, and is likely to be on a GPU."""
    arguments = jax.tree.map(jnp.asarray, arguments)
    program = jax.jit(lambda *a: compress(*a, config=config, interpret=interpret)).lower(*arguments).compile()

    def run():
        if not interpret:
            jax.block_until_ready(jnp.full((1 << 24,), jnp.nan)).delete()
        return program(*arguments)

    return run


def assert_close_where_used(spec, arguments, results):
    used = arguments[2] < spec.nodes
    for actual, wanted in zip(results, reference.compress(*arguments), strict=True):
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
            # Sums of l · D terms, and of W, wander by √n roundings; and in bfloat16 a hidden unit or a sum may be
            # rounded to the neighbour of what the reference rounds it to, two roundings and a half together.
            tolerance = 4 * np.sqrt(spec.block * spec.dim + spec.hidden) * float(jnp.finfo(jnp.float32).eps)
            tolerance += 2.5 * float(jnp.finfo(jnp.bfloat16).eps) if spec.dtype == "bfloat16" else 0.0
            actual, wanted = (np.asarray(array)[used].astype(np.float64) for array in (actual, wanted))
            np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec, interpret", SPECS)
def test_equals_reference(spec, interpret, kernel_seed):
    """Whatever is in rings, tails and unused slots that no block names: it is NaN."""
    arguments = spec.arguments(kernel_seed)
    assert_close_where_used(spec, arguments, compiled(arguments, interpret)())


def test_where_no_block_ends_nothing_is_computed():
    spec = next(spec for spec in specs.TESTS if spec.name == "nothing-ends")
    assert all(np.isnan(array).all() for array in compiled(spec.arguments(), interpret=True)())


def test_programs_of_several_steps_equal_reference():
    spec = next(spec for spec in specs.TESTS if spec.name == "odd-sizes")
    config, arguments = CompressConfig(16, 16, 3, 1, 4, 2), spec.arguments()
    assert (config.share(spec.shape), config.parts(spec.shape)) == (3, 3)
    assert_close_where_used(spec, arguments, compiled(arguments, True, config)())


@pytest.mark.gpu
@pytest.mark.parametrize("spec", specs.BENCHMARKS[1::5], ids=lambda spec: spec.name)
def test_every_config_equals_reference_and_itself(spec, kernel_seed):
    spec = dataclasses.replace(spec, used=tuple(min(spec.slots, 1 + b % 3) for b in range(len(spec.used))))
    arguments = spec.arguments(kernel_seed)
    expected = None
    for config in (None, *CompressConfig.search_space(spec.shape)[::11]):
        run = compiled(arguments, False, config)
        results = run()
        if expected is None:
            assert_close_where_used(spec, arguments, results)
            expected = results
        again = run()
        used = arguments[2] < spec.nodes
        for actual, same, wanted in zip(results, again, expected, strict=True):
            actual, same, wanted = (np.asarray(array)[used] for array in (actual, same, wanted))
            np.testing.assert_array_equal(actual, same)
            np.testing.assert_allclose(actual.astype(np.float32), wanted.astype(np.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(key=lambda x: x._replace(ring=x.ring[0])),
            r"key.ring: got shape \(2, 9, 16\), expected \[B, Hkv",
        ),
        (dict(key=lambda x: x._replace(weight=x.weight[:, 1:])), r"key.weight: got shape \(2, 127, 32\), expected"),
        (dict(value=lambda x: x._replace(fresh=x.fresh[:, :2])), r"value.fresh: got float32 \(3, 2, 2, 16\), expected"),
        (
            dict(value=lambda x: x._replace(ring=x.ring.view(np.int32))),
            r"value.ring: got int32 \(3, 2, 9, 16\), expected float32",
        ),
        (dict(value=lambda x: x._replace(weight_out=None)), "weight_out: given for one side"),
        (dict(key=lambda x: x._replace(fresh=None)), r"key.fresh: got None, expected \[B, T, Hkv, D\]"),
        (dict(value=lambda x: x._replace(ring=None)), "value.ring: got None, expected float32"),
        (dict(key=lambda x: x._replace(fresh=x.fresh[:, :0])), r"key.fresh: got shape \(3, 0, .* with T of at least 1"),
        (
            dict.fromkeys(("key", "value"), lambda x: x._replace(ring=x.ring[:, :, :6])),
            "key.ring: got a ring of 6, expected at least 7",
        ),
        (dict(slot=lambda x: x[:2]), r"slot: got int32 \(2, 2\), expected int32 \(3, 2\)"),
        (dict(start=lambda x: x.astype(np.int16)), r"start: got int16 \(3, 2\), expected int32 \(3, 2\)"),
        (dict(rotation=lambda x: x[:1]), r"rotation: got float32 \(1, 3, 2, 8\), expected float32 \(2, 3, 2, 8\)"),
    ],
)
def test_errors(change, message):
    names = ("key", "value", "slot", "back", "start", "rotation")
    arguments = dict(zip(names, RAGGED.arguments(), strict=True))
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(ValueError, match=message):
        compress(**arguments, interpret=True)


def test_unsupported_sizes_and_devices_say_which_and_why():
    with pytest.raises(UnsupportedError, match="compress: implementation 'pallas': key.ring: got head dim 512"):
        compress(*dataclasses.replace(RAGGED, dim=512).arguments(), interpret=True)
    with (
        jax.default_device(jax.devices("cpu")[0]),
        pytest.raises(UnsupportedError, match="device: got cpu, expected a GPU"),
    ):
        compress(*RAGGED.arguments())


def test_configs():
    with pytest.raises(ValueError, match="rows: got 8, expected a power of two of at least 16"):
        CompressConfig(8, 16, 1, 1, 4, 3)
    with pytest.raises(ValueError, match="num_stages: got 1.5, expected a whole number"):
        CompressConfig(16, 16, 1, 1, 4, 1.5)
    with pytest.raises(ValueError, match="num_warps: got 3, expected a power of two"):
        CompressConfig(16, 16, 1, 1, 3, 2)
    for spec in [*specs.TESTS, *specs.BENCHMARKS]:
        shape = spec.shape
        for config in (CompressConfig.heuristic(shape), *CompressConfig.search_space(shape)):
            assert config.fits(shape)
            sums = 4 * config.parts(shape) * shape.sides * shape.num_kv_heads * shape.rows * shape.width
            assert config.splits == 1 or sums <= 2**26


@pytest.mark.parametrize("spec", [*specs.TESTS, *specs.BENCHMARKS[::9]], ids=lambda spec: spec.name)
def test_lowers(spec):
    first, second = report.kernels(report.lower(compress, *spec.abstract()))
    shape = spec.shape
    config = tuned.lookup_compress("NVIDIA H200", shape) or CompressConfig.heuristic(shape)
    assert (first.name, second.name) == ("compress_project", "compress_finish")
    assert first.grid == (config.parts(shape) * -(-shape.width // config.columns), shape.num_kv_heads, shape.sides)
    # Shorter products of bfloat16 come out doubled.
    lengths = re.findall(r"tt\.dot [^\n]*: tensor<\d+x(\d+)x", first.module + second.module)
    assert lengths and min(map(int, lengths)) >= 16


def test_compiles_for_sm90():
    pytest.importorskip("triton")
    for kernel in report.kernels(report.lower(compress, *specs.BENCHMARKS[0].abstract())):
        resources = report.compile_sm90(kernel)
        assert resources.stack == 0 and resources.shared <= 227 * 1024, f"{kernel.name}: {resources}"


# What a layer makes of it.


class Phi:
    """A φ of random weights; a module's own initialization would take seconds."""

    __call__, _per_head = Compress.__call__, Compress._per_head

    def __init__(self, nsa, dtype, normal):
        self.kind, self.dtype = nsa.compression, dtype
        heads, block, dim, width = nsa.num_kv_heads, nsa.compress_block, nsa.head_dim, nsa.compress_hidden
        self.position = normal(heads, block, dim)
        if self.kind == "mlp":
            self.weight_in, self.weight_out = normal(heads, block * dim, width) / 6, normal(heads, width, dim) / 3
        else:
            self.weight = normal(heads, block * dim, dim) / 6


def layer_and_tail(dtype="float32", slots=None, seed=0, **switches):
    """A layer with random φ and cache, and a random tree behind two sequences, in which blocks end."""
    rng = np.random.default_rng(seed)
    nsa = tiny_nsa(**switches)
    heads, dim, batch = nsa.num_kv_heads, nsa.head_dim, 2

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    phi = [Phi(nsa, jnp.dtype(dtype), normal) for _ in range(2)]
    entries = normal(batch, 7, heads, dim), normal(batch, 7, heads, dim)
    lengths = jnp.array([20, 3], jnp.int32)
    tail = caches.make_tail(nsa, caches.topology([-1, 0, 0, 1, 1, 2, 3], nsa.compress_block), lengths, slots)
    ring = caches.ring_sizes(nsa, 1)[0]
    layer = SimpleNamespace(raw_key=normal(batch, heads, ring, dim), raw_value=normal(batch, heads, ring, dim))
    if not nsa.compressed_output:
        layer.raw_value, phi[1] = None, None
    return nsa, phi, entries, layer, tail


@pytest.mark.parametrize("interpret", PLACES)
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"compression": "linear", "compressed_rope": "none", "compressed_output": False, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_layers_entries_are_those_of_xla(switches, interpret, kernel_seed):
    nsa, phi, entries, layer, tail = layer_and_tail(**switches, seed=kernel_seed)
    assert kernels.compresses(nsa, phi[0], layer, tail)
    starts = jnp.take_along_axis(tail.positions, jnp.minimum(tail.slot, 6), axis=1) + 1 - nsa.compress_block
    arguments = (nsa, RopeConfig(), *phi, layer, *entries, tail, starts)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda: cached._compress_blocks(*arguments, lambda function, *blocks: function(*blocks)))()
    actual = jax.jit(lambda: kernels.compress_blocks(*arguments, interpret=interpret))()
    used = np.asarray(tail.slot) < 7
    assert used.any() and not used.all()
    for got, wanted in zip(actual, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            got, wanted = (np.asarray(array)[used].astype(np.float32) for array in (got, wanted))
            np.testing.assert_allclose(got, wanted, atol=2e-2 if switches.get("dtype") else 1e-5)


@pytest.mark.parametrize(
    "switches",
    [{"compression": "mean"}, {"compression": "weighted"}, {"compressed_rope": "before"}, {"head_dim": 512}],
    ids=str,
)
def test_layers_that_keep_xlas_code(switches):
    nsa, phi, _, layer, tail = layer_and_tail(**switches)
    assert not kernels.compresses(nsa, phi[0], layer, tail)


def test_chunks_of_prompts_keep_xlas_code():
    nsa, phi, _, layer, tail = layer_and_tail(slots=4)
    assert kernels.compresses(nsa, phi[0], layer, tail)
    long = tail._replace(positions=jnp.zeros((2, 1024), jnp.int32), slot=jnp.zeros((2, 512), jnp.int32))
    assert not kernels.compresses(nsa, phi[0], layer, long)
    tree = long._replace(positions=jnp.zeros((2, 512), jnp.int32))
    assert kernels.compresses(nsa, phi[0], layer, tree)
