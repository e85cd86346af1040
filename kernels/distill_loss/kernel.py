"""The Triton kernel that passes over the logits: softmax statistics of some rows, the gradient of others."""

import triton
import triton.language as tl

# What `_statistics` leaves of a row's block of words, in this order: maximum and sum of exp(z - maximum) of the
# student, the same of the teacher, sum of exp(t - max t) * ((t - max t) - (s - max s)), and the target's logit.
PARTS: tl.constexpr = tl.constexpr(6)
# The logit of what is no word: exp gives 0, and unlike with -inf differences stay numbers.
NO_WORD: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _logit(product, bias, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = (product + bias) * logit_scale
    if HAS_SOFTCAP:
        e = tl.exp(-2 * tl.abs(z / softcap))  # <= 1: nothing overflows
        tanh = (1 - e) / (1 + e)
        z = softcap * tl.where(z < 0, -tanh, tanh)
    return z


@triton.jit
def _load(products, bias, row, columns, inside, width, HAS_BIAS: tl.constexpr, COMPUTE: tl.constexpr):
    # Up to `width`, a multiple of 64, so that loads are wide for every V; what lies between V and width is not used.
    x = tl.load(products + row * width + columns, mask=columns < width, other=0.0).to(COMPUTE)
    x = tl.where(inside, x, 0.0)
    b = x * 0
    if HAS_BIAS:
        b = tl.load(bias + columns, mask=inside, other=0.0).to(COMPUTE)
    return x, b


@triton.jit
def _softmax(z, parts, splits, SPLITS: tl.constexpr):
    """Probabilities of a block of logits, from the maxima and sums of all blocks of its row."""
    split = tl.arange(0, SPLITS)
    maxima = tl.load(parts + split, mask=split < splits, other=float("-inf"))
    sums = tl.load(parts + splits + split, mask=split < splits, other=0.0)
    maximum = tl.max(maxima, 0)
    return tl.exp(z - maximum) * (1 / tl.sum(sums * tl.exp(maxima - maximum), 0))


@triton.jit
def _statistics(
    student,
    teacher,
    bias,
    part,  # where this row's and block's statistics go, `splits` apart
    target,
    row,
    split,
    splits,
    vocabulary,
    width,
    logit_scale,
    softcap,
    HAS_TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = split * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x, b = _load(student, bias, row, columns, inside, width, HAS_BIAS, COMPUTE)
    s = tl.where(inside, _logit(x, b, logit_scale, softcap, HAS_SOFTCAP), NO_WORD)
    s_maximum = tl.max(s, 0)
    tl.store(part, s_maximum)
    tl.store(part + splits, tl.sum(tl.exp(s - s_maximum), 0))
    if HAS_TEACHER:
        y, b = _load(teacher, bias, row, columns, inside, width, HAS_BIAS, COMPUTE)
        t = tl.where(inside, _logit(y, b, logit_scale, softcap, HAS_SOFTCAP), NO_WORD)
        t_maximum = tl.max(t, 0)
        weight = tl.exp(t - t_maximum)
        # relative to the maxima: a shift of all logits costs no digits
        difference = (t - t_maximum) - (s - s_maximum)
        tl.store(part + 2 * splits, t_maximum)
        tl.store(part + 3 * splits, tl.sum(weight, 0))
        tl.store(part + 4 * splits, tl.sum(weight * difference, 0))
    own = (target >= split * BLOCK) & (target < split * BLOCK + BLOCK) & (target < vocabulary)
    product = tl.load(student + row * width + target, mask=own, other=0.0).to(COMPUTE)
    word_bias = product * 0
    if HAS_BIAS:
        word_bias = tl.load(bias + target, mask=own, other=0.0).to(COMPUTE)
    tl.store(part + 5 * splits, tl.where(own, _logit(product, word_bias, logit_scale, softcap, HAS_SOFTCAP), 0.0))


@triton.jit
def _gradient(
    student,
    teacher,
    bias,
    parts,  # of this row
    target,
    kl,
    next_token,
    row,
    split,
    splits,
    vocabulary,
    width,
    logit_scale,
    softcap,
    HAS_KL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    columns = split * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    x, b = _load(student, bias, row, columns, inside, width, HAS_BIAS, COMPUTE)
    s = _logit(x, b, logit_scale, softcap, HAS_SOFTCAP)
    p_student = _softmax(s, parts, splits, SPLITS)
    gradient = next_token * (p_student - tl.where(columns == target, 1.0, 0.0))
    if HAS_KL:
        y, b = _load(teacher, bias, row, columns, inside, width, HAS_BIAS, COMPUTE)
        t = _logit(y, b, logit_scale, softcap, HAS_SOFTCAP)
        # the difference first: equal hidden states give exactly 0
        gradient += kl * (p_student - _softmax(t, parts + 2 * splits, splits, SPLITS))
    if HAS_SOFTCAP:
        e = tl.exp(-2 * tl.abs((x + b) * logit_scale / softcap))
        gradient *= 4 * e / ((1 + e) * (1 + e))  # tanh' = 1 - tanh^2
    gradient *= logit_scale
    tl.store(
        student + row * width + columns,
        gradient.to(student.dtype.element_ty),
        mask=columns < width,
        eviction_policy="evict_first",  # room in L2 for logits that are yet to be read again
    )


@triton.jit(do_not_specialize=["first_row", "first_word", "first_split", "gradient_from", "rows", "statistics_from"])
def pass_over_logits(
    student,  # [n, width], products with the head; rows get their gradient in place
    teacher,  # the same, read only
    bias,  # [V]
    parts,  # [N, PARTS, splits]
    targets,  # [N]
    kl_factor,  # [N]
    next_token_factor,  # [N]
    first_row,  # the position of row 0
    first_word,  # of this shard
    first_split,  # of this shard
    own_splits,
    splits,
    gradient_from,  # rows gradient_from + 0, 1, .. rows - 1 get their gradient,
    rows,
    statistics_from,  # those from here on their statistics
    vocabulary,  # of this shard
    width,
    logit_scale,  # [1]
    softcap,  # [1]
    HAS_TEACHER: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per row and block of words. A row gets its statistics in one launch, its gradient in a later one."""
    logit_scale = tl.load(logit_scale)
    softcap = tl.load(softcap)
    program = tl.program_id(0)
    split = program % own_splits
    item = program // own_splits
    row = tl.where(item < rows, gradient_from + item, statistics_from + item - rows).to(tl.int64)
    position = first_row + row
    target = tl.load(targets + position) - first_word
    row_parts = parts + position * PARTS * splits
    if item < rows:
        _gradient(
            student,
            teacher,
            bias,
            row_parts,
            target,
            tl.load(kl_factor + position),
            tl.load(next_token_factor + position),
            row,
            split,
            splits,
            vocabulary,
            width,
            logit_scale,
            softcap,
            HAS_KL,
            HAS_BIAS,
            HAS_SOFTCAP,
            COMPUTE,
            BLOCK,
            SPLITS,
        )
    else:
        _statistics(
            student,
            teacher,
            bias,
            row_parts + first_split + split,
            target,
            row,
            split,
            splits,
            vocabulary,
            width,
            logit_scale,
            softcap,
            HAS_TEACHER,
            HAS_BIAS,
            HAS_SOFTCAP,
            COMPUTE,
            BLOCK,
        )
