"""Mosaic GPU as the kernels use it: what differs between versions of JAX, and between hardware and the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def kernel(
    body: Callable[..., None], *, reduction_scratch_bytes: int = 2048, interpret: Any = None, **options: Any
) -> Callable[..., Any]:
    """`plgpu.kernel`, compiled for Hopper unless `interpret` says otherwise.

    Args:
      body, options: as `plgpu.kernel` takes them.
      reduction_scratch_bytes: shared memory for reductions across the warps of a warpgroup.
      interpret: parameters of Mosaic's interpreter, None to compile.
    """
    params = plgpu.CompilerParams(
        approx_math=True,
        reduction_scratch_bytes=reduction_scratch_bytes,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
    )
    if interpret is not None:
        options["interpret"] = interpret
    return plgpu.kernel(body, compiler_params=params, **options)


def inline(plain: Callable[..., Any], *, interpreted: bool, **types: Any) -> Callable[..., Any]:
    """`plgpu.inline_mgpu`, in whose place the interpreter runs `plain`, a function of the same operands in jnp."""
    return (lambda _: plain) if interpreted else plgpu.inline_mgpu(**types)


def operand_scratch(shape: Sequence[int], dtype: Any, transforms: Any, *, interpreted: bool) -> Any:
    """Shared memory for what `operand` hands to wgmma, which the interpreter alone needs: else None."""
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms) if interpreted else None


def operand(value: Any, scratch: Any, *index: Any) -> Any:
    """A row operand of wgmma, in registers; the interpreter, which takes none there, has it in `scratch` at `index`."""
    if scratch is None:
        return value
    place = scratch.at[index]
    place[...] = value
    plgpu.commit_smem()
    return place


def products(multiply: Callable[..., None], shapes: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
    """What float32 accumulators of `shapes` hold once the products that `multiply` adds to them are there."""

    def complete(*accumulators):
        multiply(*accumulators)
        return tuple(acc[...] for acc in accumulators)

    return _after_wait(pl.run_scoped(complete, *(plgpu.ACC(shape, jnp.float32) for shape in shapes)))


def accumulated(multiply: Callable[..., None], sums: Any, *, interpreted: bool) -> Any:
    """`sums`, float32 in wgmma's layout, and the products that `multiply` adds; the interpreter adds them up itself."""
    if interpreted:  # it takes no accumulator that holds something
        (update,) = products(multiply, [sums.shape])
        return sums + update
    return _after_wait(pl.run_state(multiply)(plgpu.ACC.init(sums)))


def _after_wait(sums: Any) -> Any:
    """Accumulators that were read, float32 in wgmma's layout, tied to their wait.

    For LLVM the wait does not touch their registers, and arithmetic on them may be moved above it.
    """
    return lax.optimization_barrier(sums)


def finish_together(done: Any) -> None:
    """Ends all warpgroups at once, by a barrier that each arrives at.

    Where one exits while another still multiplies, jax-linear-attention 0.1.0 met illegal instructions on H100s.
    """
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)


def transposed(ref: Any) -> Any:
    """A view of a two-dimensional reference with its axes exchanged."""
    return ref.T if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Any:
    """All of a reference as an array in `layout`."""
    if jax.__version_info__ >= (0, 11, 2):
        return plgpu.load(ref, layout=layout, optimized=optimized)
    return plgpu.load(ref, (), layout=layout, optimized=optimized)


def store(ref: Any, value: Any) -> None:
    """Writes an array to all of a reference, conflict-free or not."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def store_transposed(ref: Any, value: Any, transforms: tuple[Any, ...]) -> None:
    """Writes [n, m], in wgmma's layout and of 16 bits, to an [m, n] reference of shared memory with `transforms`."""
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    if hasattr(plgpu, "store"):
        plgpu.store(ref.T, value)
        return

    from jax.experimental.mosaic import gpu as mgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.Layout.WGMMA_TRANSPOSED))
    def write(_, tiles, array):
        mgpu.warpgroup_barrier()
        swizzle = transforms[1].swizzle
        array.store_tiled(mgpu.memref_transpose(tiles, (1, 0, 3, 2)), swizzle=swizzle, optimized=False)

    write(ref, value)


def scatter_transposed(ref: Any, value: Any, rows: tuple[Any, Any] | None, *, interpreted: bool) -> None:
    """Writes [n, m], in wgmma's layout, to an [m, n] reference of global memory, element by element.

    Of the m rows only those from the first of `rows` to before the second, where that is given.
    """

    def plain(elements, array, *rows):
        if not rows:
            store(transposed(elements), array)
            return

        @pl.loop(jnp.maximum(rows[0], 0), jnp.minimum(rows[1], array.shape[1]))
        def _(row):
            elements[row, :] = lax.dynamic_index_in_dim(array, row, axis=1, keepdims=False)

    scalar = plgpu.Layout.WG_SPLAT(())
    types = (plgpu.RefType(), plgpu.Layout.WGMMA, *[scalar] * (0 if rows is None else 2))

    @inline(plain, interpreted=interpreted, arg_types=types)
    def write(_, elements, array, *rows):
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith, memref, scf

        bounds = [arith.index_cast(ir.IndexType.get(), row.registers.item()) for row in rows]

        def put(element, at):
            if not bounds:
                memref.store(element, elements, at[::-1])
                return
            after = arith.cmpi(arith.CmpIPredicate.sge, at[1], bounds[0])
            before = arith.cmpi(arith.CmpIPredicate.slt, at[1], bounds[1])
            condition = scf.IfOp(arith.andi(after, before))
            with ir.InsertionPoint(condition.then_block):
                memref.store(element, elements, at[::-1])
                scf.yield_([])

        array.foreach(put)

    write(ref, value, *(rows or ()))
