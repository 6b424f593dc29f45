"""Products of sorted rows, each group of them with a kernel of its own."""

import jax
import jax.numpy as jnp

# XLA:CPU (jaxlib 0.10) makes `ragged_dot` of every row and every kernel: with 8 groups its gradient took 3 to 9 times
# the loop's below, which takes up to 1.4 times equal groups in one batched product. 64 and 128 rows a step did best.
BLOCK_ROWS = 64


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[R, F] in float32: the first sizes_E[0] rows of x times kernel 0, the next sizes_E[1] times kernel 1, and so on.

    Rows after the last group are zero, whatever x is there. As in `linear`, products are in x's dtype and sums in
    float32, forward and backward.
    """
    return _product(x_RD, kernel_EDF.astype(x_RD.dtype), sizes_E)


def _forward(x, kernel, sizes):
    return grouped_matmul(x, kernel, sizes), (x, kernel, sizes)


def _backward(residuals, g):
    x, kernel, sizes = residuals
    g = g.astype(x.dtype)
    dx = _product(g, kernel.astype(x.dtype).swapaxes(1, 2), sizes)
    dkernel = jax.lax.platform_dependent(x, g, sizes, cpu=_outer_by_blocks, default=_ragged_outer)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _product(x, kernel, sizes):
    y = jax.lax.platform_dependent(x, kernel, sizes, cpu=_by_blocks, default=_ragged)
    in_a_group = jnp.arange(x.shape[0]) < jnp.sum(sizes)
    return jnp.where(in_a_group[:, None], y, 0.0)


def _ragged(x, kernel, sizes):
    return jax.lax.ragged_dot(x, kernel, sizes, preferred_element_type=jnp.float32)


def _ragged_outer(x, g, sizes):
    rows = jax.lax.RaggedDotDimensionNumbers(
        (((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    return jax.lax.ragged_dot_general(x, g, sizes, rows, preferred_element_type=jnp.float32)


def _by_blocks(x, kernel, sizes):
    """A block at a time: the rows past a group's end in its last block are written over by the next group's first."""
    R, block = x.shape[0], min(BLOCK_ROWS, x.shape[0])
    count, groups, starts, _ = _blocks(sizes, R, block)
    x = jnp.pad(x, ((0, block), (0, 0)))

    def step(i, y):
        rows = jax.lax.dynamic_slice_in_dim(x, starts[i], block)
        product = _dot(rows, jax.lax.dynamic_index_in_dim(kernel, groups[i], keepdims=False), 1, 0)
        return jax.lax.dynamic_update_slice_in_dim(y, product, starts[i], 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((R + block, kernel.shape[2]), jnp.float32))[:R]


def _outer_by_blocks(x, g, sizes):
    """[E, D, F] in float32: x' g over the rows of each group."""
    R, block = x.shape[0], min(BLOCK_ROWS, x.shape[0])
    count, groups, starts, rows = _blocks(sizes, R, block)
    x, g = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, g))

    def step(i, total):
        x_rows, g_rows = (jax.lax.dynamic_slice_in_dim(a, starts[i], block) for a in (x, g))
        own = jnp.where(jnp.arange(block)[:, None] < rows[i], x_rows, 0)
        group = jax.lax.dynamic_index_in_dim(total, groups[i], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, group + _dot(own, g_rows, 0, 0), groups[i], 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), jnp.float32))


def _blocks(sizes, R, block):
    """(how many blocks there are, and of each its group, its first row and how many of its rows are the group's)."""
    blocks = -(-sizes // block)
    last_block, last_row = jnp.cumsum(blocks), jnp.cumsum(sizes)
    i = jnp.arange(-(-R // block) + len(sizes))
    group = jnp.minimum(jnp.searchsorted(last_block, i, side="right"), len(sizes) - 1)
    start = (last_row - sizes)[group] + (i - (last_block - blocks)[group]) * block
    return last_block[-1], group, start, jnp.minimum(last_row[group] - start, block)


def _dot(a, b, contracted_a, contracted_b):
    return jax.lax.dot_general(a, b, (((contracted_a,), (contracted_b,)), ((), ())), preferred_element_type=jnp.float32)
