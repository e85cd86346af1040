"""The Triton kernel of small_batch_linear: which program works at which weight, the sums, and what becomes of them."""

import triton
import triton.language as tl

TF32_BITS: tl.constexpr = tl.constexpr(0xFFFFE000)  # of a number in fp32, those that tf32 has


@triton.jit
def linears(
    x,  # [rows, C]
    weight_0,  # [N_0, C]
    weight_1,
    weight_2,
    weight_3,
    bias_0,  # [N_0]
    bias_1,
    bias_2,
    bias_3,
    output_0,  # [rows, N_0]
    output_1,
    output_2,
    output_3,
    residual,  # [rows, N_0], or None
    size_0,  # N_0
    size_1,
    size_2,
    size_3,
    stride_0,
    stride_1,
    stride_2,
    stride_3,
    end_0,  # the first program that works at the next weight
    end_1,
    end_2,
    rows,
    columns,
    x_stride,
    residual_stride,
    zero,  # 0.0
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # weights of the first one's dtype, which come first; the others share another dtype
    BM: tl.constexpr,
    FIRST_TILE: tl.constexpr,  # outputs, columns and stages of a program that works at one of those weights
    TILE: tl.constexpr,  # at another
    EVEN: tl.constexpr,
    SILU: tl.constexpr,  # bit i: output i goes through SiLU
    MULTIPLY: tl.constexpr,  # the only output is that of weight 0, after SiLU, times that of weight 1
):
    program = tl.program_id(0)
    weights = (weight_0, weight_1, weight_2, weight_3)
    biases = (bias_0, bias_1, bias_2, bias_3)
    outputs = (output_0, output_1, output_2, output_3)
    sizes = (size_0, size_1, size_2, size_3)
    strides = (stride_0, stride_1, stride_2, stride_3)
    begins = (0, end_0, end_1, end_2)
    read = (x, rows, columns, x_stride, zero)
    # One loop for each dtype, whose weight is chosen before it: loops of their own would each hold shared memory, and
    # leave room for half as many programs.
    if MULTIPLY:
        _multiplied(read, weights, biases, output_0, size_0, strides, program, BM, FIRST_TILE, EVEN)
    elif (FIRST == COUNT) | (program < begins[FIRST % COUNT]):
        _linear(
            read, weights, biases, outputs, residual, residual_stride, sizes, strides, begins, program, 0, FIRST, BM,
            FIRST_TILE, EVEN, SILU,
        )  # fmt: skip
    else:
        if FIRST < COUNT:
            _linear(
                read, weights, biases, outputs, residual, residual_stride, sizes, strides, begins, program, FIRST,
                COUNT, BM, TILE, EVEN, SILU,
            )  # fmt: skip


@triton.jit
def _linear(
    read, weights, biases, outputs, residual, residual_stride, sizes, strides, begins, program, FROM: tl.constexpr,
    TO: tl.constexpr, BM: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The program's outputs, of that one of the weights FROM..TO that it works at."""
    BN: tl.constexpr = TILE[0]
    weight, size, stride, begin = weights[FROM], sizes[FROM], strides[FROM], begins[FROM]
    for i in tl.static_range(FROM + 1, TO):
        if program >= begins[i]:
            weight, size, stride, begin = weights[i], sizes[i], strides[i], begins[i]
    rows, row, out = read[1], tl.arange(0, BM), (program - begin) * BN + tl.arange(0, BN)
    total = _products(read, weight + out[:, None].to(tl.int64) * stride, out < size, BM, TILE, EVEN)
    place, mask = row[None, :] * size + out[:, None], (row < rows)[None, :] & (out < size)[:, None]
    for i in tl.static_range(FROM, TO):
        is_own = program >= begins[i]
        if i + 1 < TO:
            is_own &= program < begins[i + 1]
        if is_own:
            dtype: tl.constexpr = outputs[i].dtype.element_ty
            result = total
            if biases[i] is not None:
                result += tl.load(biases[i] + out, mask=out < size, other=0.0).to(tl.float32)[:, None]
            result = result.to(dtype)
            if (SILU >> i) & 1:
                result = _silu(result)
            if residual is not None:
                other = tl.load(residual + row[None, :] * residual_stride + out[:, None], mask=mask, other=0.0)
                result = (result.to(tl.float32) + other.to(tl.float32)).to(dtype)
            tl.store(outputs[i] + place, result, mask=mask)


@triton.jit
def _multiplied(
    read, weights, biases, output, size, strides, program, BM: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The program's products of two outputs: its rows are those of both weights in turns."""
    BN: tl.constexpr = TILE[0]
    HALF: tl.constexpr = BN // 2
    row, both, out = tl.arange(0, BM), tl.arange(0, BN), program * HALF + tl.arange(0, HALF)
    of_both, is_first = program * HALF + both // 2, both % 2 == 0
    weight_rows = tl.where(
        is_first, weights[0] + of_both.to(tl.int64) * strides[0], weights[1] + of_both.to(tl.int64) * strides[1]
    )
    total = _products(read, weight_rows[:, None], of_both < size, BM, TILE, EVEN)
    first, second = tl.split(tl.permute(tl.reshape(total, [HALF, 2, BM]), [0, 2, 1]))
    if biases[0] is not None:
        first += tl.load(biases[0] + out, mask=out < size, other=0.0).to(tl.float32)[:, None]
    if biases[1] is not None:
        second += tl.load(biases[1] + out, mask=out < size, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = output.dtype.element_ty
    first, second = _silu(first.to(dtype)), second.to(dtype)
    result = (first.to(tl.float32) * second.to(tl.float32)).to(dtype)
    mask = (row < read[1])[None, :] & (out < size)[:, None]
    tl.store(output + row[None, :] * size + out[:, None], result, mask=mask)


@triton.jit
def _silu(x):
    """Rounded to the dtype of x, as a layer of its own would."""
    value = x.to(tl.float32)
    return (value * tl.sigmoid(value)).to(x.dtype)


@triton.jit
def _products(read, weight_rows, exists, BM: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr):
    """Sums over C of the weight's rows [BN, 1] and the rows of x, [BN, BM] in fp32."""
    x, rows, columns, x_stride, zero = read
    BN: tl.constexpr = TILE[0]
    BK: tl.constexpr = TILE[1]
    dtype: tl.constexpr = weight_rows.dtype.element_ty
    row, column = tl.arange(0, BM), tl.arange(0, BK)
    x_rows = x + row[:, None] * x_stride
    total = tl.zeros([BN, BM], tl.float32)
    rest = tl.zeros([BN, BM], tl.float32)
    nothing = tl.zeros([BN, BM], tl.float32) + zero  # which the compiler cannot know, else it would add to the total
    for start in tl.range(0, columns, BK, num_stages=TILE[2]):
        at = start + column[None, :]
        weight_mask, x_mask = exists[:, None], (row < rows)[:, None]
        if not EVEN:
            weight_mask, x_mask = weight_mask & (at < columns), x_mask & (at < columns)
        values = tl.load(weight_rows + at, mask=weight_mask, other=0.0, eviction_policy="evict_first")
        inputs = tl.trans(tl.load(x_rows + at, mask=x_mask, other=0.0))
        if dtype == tl.float32:
            # 16 bits of x are exact in tf32: only the weight is cut in two. A step's products have a sum of their own,
            # which is added in fp32: tensor cores cut off what they add to a sum, and 1,000 cuts show in the result.
            # (They don't for what is cut off the weight, which has a sum to itself, so that neither waits.)
            high = (values.to(tl.uint32, bitcast=True) & TF32_BITS).to(tl.float32, bitcast=True)
            rest = tl.dot(values - high, inputs.to(tl.float32), rest, input_precision="tf32")
            total += tl.dot(high, inputs.to(tl.float32), nothing, input_precision="tf32")
        else:
            total = tl.dot(values, inputs.to(values.dtype), total)
    return total + rest
