"""What the Hopper kernels share, and one name each for what Gluon has called differently in versions of Triton."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
fence = hopper.fence_async_shared
in_flight = hopper.warpgroup_mma_init


@gluon.jit
def load(descriptor, batch, head, start, slot, buffers, ready):
    """Starts to copy rows start.. of [B, heads, T, D] into buffer `slot`, whose barrier tells when they are there."""
    mbarrier.expect(ready.index(slot), descriptor.block_type.nbytes)
    copy_in(descriptor, [batch, head, start, 0], ready.index(slot), buffers.index(slot))


@gluon.jit
def release(free, slot):
    """Tells the copying warp that this group of warps has read buffer `slot`."""
    synchronize()  # one thread speaks for all
    mbarrier.arrive(free.index(slot), count=1)
