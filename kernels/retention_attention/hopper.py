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
def span(FIRST, batch, start, T, BM: gl.constexpr, BN: gl.constexpr, SPANS: gl.constexpr, layout: gl.constexpr):
    """First key that each query sees; where the blocks begin that any of the queries sees, and that all see whole."""
    t = start + gl.arange(0, BM, layout=layout)
    first = t
    begin = 0
    inner = 0
    if SPANS:
        first = gl.load(FIRST + batch.to(gl.int64) * T + t, mask=t < T, other=T)
        begin = gl.min(first, 0) // BN * BN
        inner = gl.cdiv(gl.max(first, 0), BN) * BN
    return first, gl.minimum(begin, start), inner


@gluon.jit
def load(descriptor, batch, head, start, slot, buffers, ready):
    """Starts to copy rows start.. of [B, heads, T, D] into buffer `slot`, whose barrier tells when they are there."""
    mbarrier.expect(ready.index(slot), descriptor.block_type.nbytes)
    copy_in(descriptor, [batch, head, start, 0], ready.index(slot), buffers.index(slot))


@gluon.jit
def release(free, slot):
    """Tells the copying warp that this group of warps has read buffer `slot`."""
    synchronize()  # one thread speaks for its group
    mbarrier.arrive(free.index(slot), count=1)


@gluon.jit
def claim(free, index, STAGES: gl.constexpr):
    """Waits until both groups of warps have read what the buffer of step `index` held before."""
    synchronize()
    mbarrier.wait(free.index(index % STAGES), ((index // STAGES) & 1) ^ 1)


@gluon.jit
def load_pair(one, other, batch, head, start, slot, buffers_one, buffers_other, ready):
    """As `load`, of the same rows of two tensors, with one barrier for both."""
    mbarrier.expect(ready.index(slot), one.block_type.nbytes + other.block_type.nbytes)
    copy_in(one, [batch, head, start, 0], ready.index(slot), buffers_one.index(slot))
    copy_in(other, [batch, head, start, 0], ready.index(slot), buffers_other.index(slot))
