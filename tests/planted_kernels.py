"""Compiles small kernels for an H200, each twice, sound and with a fault that the reader of PTX is to see."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from ridgeline.pallas_kernels import layouts, mosaic
from ridgeline.sharding.targets import compile_for_target, target_mesh

ROWS, COLUMNS, STEPS = 64, 64, 4
TILES = layouts.tiled(COLUMNS, 2)
TILE = plgpu.SMEM((ROWS, COLUMNS), jnp.bfloat16, transforms=TILES)


def accumulator(sound, x, out, *, tile, barrier):
    """The product is scaled before the wait for it."""
    plgpu.copy_gmem_to_smem(x.at[0], tile, barrier)
    plgpu.barrier_wait(barrier)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(TILES),),
        return_type=plgpu.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32, layout=plgpu.Layout.WGMMA),
    )
    def product(_, tile):
        from jax._src.lib.mlir.dialects import nvvm
        from jax.experimental.mosaic import gpu as mgpu

        acc = mgpu.wgmma(mgpu.WGMMAAccumulator.zero(ROWS, COLUMNS), tile, tile, swizzle=TILES[1].swizzle)
        nvvm.wgmma_commit_group_sync_aligned()
        return acc.value

    sums = product(tile)
    if sound:
        plgpu.wgmma_wait(0)
        sums = lax.optimization_barrier(sums)
    mosaic.store(out, sums * 2.0)
    plgpu.wgmma_wait(0)


def operand(sound, x, out, *, tile, barrier):
    """The operand in registers is made anew while the product of the loop's last turn reads it."""
    plgpu.copy_gmem_to_smem(x.at[0], tile, barrier)
    plgpu.barrier_wait(barrier)

    def products(acc):
        def turn(_, factor):
            plgpu.wgmma(acc, factor, tile)
            if sound:
                plgpu.wgmma_wait(0)
            return factor * factor

        lax.fori_loop(0, x[1, 0, 0].astype(jnp.int32), turn, mosaic.load(tile, plgpu.Layout.WGMMA, optimized=False))
        return acc[...]

    mosaic.store(out, pl.run_scoped(products, plgpu.ACC((ROWS, COLUMNS), jnp.float32)))


def slot(sound, x, out, *, tile, barrier):
    """A tile is read by ordinary loads, and the next one copied over it."""

    def turn(i, total):
        if sound:
            plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(x.at[i], tile, barrier)
        plgpu.barrier_wait(barrier)
        return total + mosaic.load(tile, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)

    mosaic.store(out, lax.fori_loop(0, STEPS, turn, layouts.filled((ROWS, COLUMNS), 0.0, plgpu.Layout.WGMMA)))


def slot_of_another(sound, x, out, *, tile, barrier, freed):
    """The same by two warpgroups, one of which copies what the other reads."""
    copies = lax.axis_index("warpgroup") == 1

    @pl.when(copies)
    def _():
        @pl.loop(0, STEPS)
        def _(i):
            pl.when(i > 0)(lambda: plgpu.barrier_wait(freed))
            if sound:
                plgpu.commit_smem()
            plgpu.copy_gmem_to_smem(x.at[i], tile, barrier)

    @pl.when(~copies)
    def _():
        def turn(_, total):
            plgpu.barrier_wait(barrier)
            value = mosaic.load(tile, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)
            plgpu.barrier_arrive(freed)
            return total + value

        mosaic.store(out, lax.fori_loop(0, STEPS, turn, layouts.filled((ROWS, COLUMNS), 0.0, plgpu.Layout.WGMMA)))


def main() -> None:
    place = NamedSharding(target_mesh("h200"), PartitionSpec())
    x = jax.ShapeDtypeStruct((STEPS, ROWS, COLUMNS), jnp.bfloat16, sharding=place)
    for body in (accumulator, operand, slot, slot_of_another):
        scratch, warpgroups = {"tile": TILE, "barrier": plgpu.Barrier()}, {}
        if body is slot_of_another:
            scratch["freed"] = plgpu.Barrier()
            warpgroups = {"num_threads": 2, "thread_name": "warpgroup"}
        for sound in (True, False):
            kernel = mosaic.kernel(
                functools.partial(body, sound),
                out_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32),
                grid=(1,),
                grid_names=("block",),
                scratch_types=scratch,
                kernel_name=f"{'sound' if sound else 'faulty'}_{body.__name__}",
                **warpgroups,
            )
            compile_for_target(jax.jit(kernel).lower(x))


if __name__ == "__main__":
    main()
