"""Where a rate lies among the intervals of nodes, inside kernels."""

import triton
import triton.language as tl

# arguments whose divisibility is no reason to compile again
COUNTS = ["chunks", "rows", "rows_per_split", "sums_per_batch"]


@triton.jit
def locate(log_beta, offset, lowest, per_octave, intervals):
    """Interval of each rate -log_beta, and its place in [-1, 1] there, in the logarithm."""
    place = (tl.log2(offset - log_beta) - lowest) * per_octave
    interval = tl.minimum(tl.maximum(place, 0.0), intervals - 1.0).to(tl.int32)
    return interval, 2.0 * (place - interval.to(tl.float32)) - 1.0
