"""Attention over the paged cache in Triton. Pointers and constants are in capitals.

The design is that of vLLM's unified attention and of "The Anatomy of a Triton Attention Kernel" (arXiv:2511.11581): a
program takes a tile of queries and one key-value head. The rows of its tile are the query heads of that key-value head,
token by token, so that each key is read once for all of them; the softmax is computed online (Milakov and Gimelshein
2018, arXiv:1805.02867), in float32 and to the base 2. Decodes are split over the context (Flash-Decoding) into segments
of at least ``LEAST_SEGMENT`` keys, whose results another kernel puts together.

Everything that differs between two steps of one shape is read on the device: lengths, tables, where a tile begins. The
number of launched segments never decides how the context is cut, its length does that alone. So a row has the same bits
in any company and in any grid, and a captured launch stays right.

Rows whose tokens see more than what stands before them, as far as a window goes back (images), bring the end of what
they see, and where it begins if no window bounds it.

Pools of 8 bits are read and written by the GPU's own conversions, or as bits where it has none (``AS_BITS``): before
Ada, and in the interpreter, whose rounding is wrong.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NEGATIVE = tl.constexpr(float("-inf"))
NOWHERE = tl.constexpr(2**30)  # behind every key
LARGEST = tl.constexpr(448.0)
"""That 8 bits (e4m3) can hold."""
PRECISION = tl.constexpr("tf32x3")
"""Of products of float32, the only ones that it concerns: on tensor cores, nearly as exact as without them."""


@triton.jit
def _stored(x, scale, POOL: tl.constexpr, AS_BITS: tl.constexpr):
    """As a pool keeps it. What is too large for 8 bits becomes the largest that they hold."""
    if POOL.primitive_bitwidth == 8:
        x = tl.clamp(x.to(tl.float32) / scale, -LARGEST, LARGEST)
    if AS_BITS:
        bits = x.to(tl.uint32, bitcast=True)
        # Three bits of the mantissa are left, rounded to the nearest, to even between two; the exponent counts from -7.
        normal = (((bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2**-6 steps are 2**-9 wide, as float32's are at 2**14: adding that rounds, and counts them.
        small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        x = ((bits >> 24) & 0x80) | tl.where(tl.abs(x) < 0.015625, small, normal)
    return x.to(POOL)


@triton.jit
def _read(x, NUMBER: tl.constexpr, AS_BITS: tl.constexpr):
    """What a pool keeps, in the number format of a product. Of bits it is 2**-8 of their value, as in float16 their
    exponent counts from -15."""
    if AS_BITS:
        x = x.to(tl.uint16)
        x = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return x.to(NUMBER)


@triton.jit
def write_kernel(
    K, V, KEYS, VALUES, SLOTS, k_token, k_head, v_token, v_head, k_scale, v_scale,
    HK: tl.constexpr, HP: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    AS_BITS: tl.constexpr,
):  # fmt: skip
    """One token's keys and values (T, HK, DK | DV) into its row of the pools; no row for a negative slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token)
    if slot < 0:
        return
    head = tl.arange(0, HP)[:, None]
    dk = tl.arange(0, DKP)[None, :]
    dv = tl.arange(0, DVP)[None, :]
    k_mask, v_mask = (head < HK) & (dk < DK), (head < HK) & (dv < DV)
    k = tl.load(K + token * k_token + head * k_head + dk, mask=k_mask, other=0.0)
    v = tl.load(V + token * v_token + head * v_head + dv, mask=v_mask, other=0.0)
    k, v = _stored(k, k_scale, KEYS.dtype.element_ty, AS_BITS), _stored(v, v_scale, VALUES.dtype.element_ty, AS_BITS)
    tl.store(KEYS + (slot * HK + head) * DK + dk, k, mask=k_mask)
    tl.store(VALUES + (slot * HK + head) * DV + dv, v, mask=v_mask)


@triton.jit
def _segment_length(num_keys, SEGMENTS: tl.constexpr, LEAST_SEGMENT: tl.constexpr, BN: tl.constexpr):
    """Keys of a segment, by the number of keys alone."""
    share = (num_keys + SEGMENTS - 1) // SEGMENTS
    return tl.maximum(LEAST_SEGMENT, (share + BN - 1) // BN * BN)


@triton.jit
def _scores(
    q, q_rest, KEYS, slot, seen, hk, scale, softcap,
    HK: tl.constexpr, DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    AS_BITS: tl.constexpr,
):  # fmt: skip
    """(rows, keys) float32, to the base 2: a head size that is no power of two is taken in two parts."""
    d1 = tl.arange(0, D1)
    keys = KEYS + ((slot * HK + hk) * DK)[None, :]
    mask = seen[None, :]
    if D1 > DK:
        mask = mask & (d1 < DK)[:, None]
    k = tl.load(keys + d1[:, None], mask=mask, other=0.0)
    scores = tl.dot(q, _read(k, q.dtype, AS_BITS), input_precision=PRECISION)
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        k = tl.load(keys + d2[:, None], mask=seen[None, :] & (d2 < DK)[:, None], other=0.0)
        scores += tl.dot(q_rest, _read(k, q.dtype, AS_BITS), input_precision=PRECISION)
    scores *= scale
    if HAS_SOFTCAP:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1) * LOG2_E
    return scores


@triton.jit
def _queries(
    Q, row, head, row_ok, q_token, q_head,
    DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """The tile's queries, and the rest of a head size that is no power of two (else the same again)."""
    d1 = tl.arange(0, D1)
    queries = Q + row[:, None] * q_token + head[:, None] * q_head
    mask = row_ok[:, None]
    if D1 > DK:
        mask = mask & (d1 < DK)[None, :]
    q = tl.load(queries + d1[None, :], mask=mask, other=0.0)
    q = q.to(tl.float32) if IN_FLOAT32 else q
    rest = q
    if D2 > 0:
        d2 = D1 + tl.arange(0, D2)
        rest = tl.load(queries + d2[None, :], mask=row_ok[:, None] & (d2 < DK)[None, :], other=0.0)
        rest = rest.to(tl.float32) if IN_FLOAT32 else rest
    return q, rest


@triton.jit
def _attend(
    q, q_rest, KEYS, VALUES, table, low, high, firsts, ends, row_ok, hk, scale, softcap,
    HK: tl.constexpr, DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    AS_BITS: tl.constexpr,
):  # fmt: skip
    """Over the keys [low, high), of which a row sees [firsts, ends): the sum of values so far, and the maximum and the
    sum of weights that belong to it."""
    dv = tl.arange(0, DVP)
    maximum = tl.full([BM], NEGATIVE, tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, DVP], tl.float32)
    for start in range(low, high, BN):
        n = start + tl.arange(0, BN)
        seen = n < high
        slot = tl.load(table + n // BLOCK, mask=seen, other=0).to(tl.int64) * BLOCK + n % BLOCK
        scores = _scores(q, q_rest, KEYS, slot, seen, hk, scale, softcap, HK, DK, D1, D2, HAS_SOFTCAP, AS_BITS)
        keep = seen[None, :] & (n[None, :] < ends[:, None]) & row_ok[:, None]
        if HAS_WINDOW:
            keep = keep & (n[None, :] >= firsts[:, None])
        scores = tl.where(keep, scores, NEGATIVE)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(new_maximum == NEGATIVE, 0.0, new_maximum)  # a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weights, 1)
        mask = seen[:, None]
        if DVP > DV:
            mask = mask & (dv < DV)[None, :]
        v = tl.load(VALUES + ((slot * HK + hk) * DV)[:, None] + dv[None, :], mask=mask, other=0.0)
        v = _read(v, q.dtype, AS_BITS)
        out = out * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision=PRECISION)
        maximum = new_maximum
    return out, maximum, total


@triton.jit
def _with_sinks(out, maximum, total, SINKS, head, row_ok):
    """One more logit for each head, whose value is nothing."""
    sink = tl.load(SINKS + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2_E
    new_maximum = tl.maximum(maximum, sink)
    shrink = tl.exp2(maximum - new_maximum)
    return out * shrink[:, None], total * shrink + tl.exp2(sink - new_maximum)


@triton.jit(do_not_specialize=["table_width", "window"])
def decode_kernel(
    Q, KEYS, VALUES, OUT, PARTS, PART_MAX, PART_SUM, TABLES, TABLE_ROWS, KV_LENS, ROWS, SINKS,
    q_token, q_head, o_token, o_head, table_width, scale, v_scale, softcap, window,
    G: tl.constexpr, HK: tl.constexpr, DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SEGMENTS: tl.constexpr,
    LEAST_SEGMENT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    IN_FLOAT32: tl.constexpr, AS_BITS: tl.constexpr,
):  # fmt: skip
    """A sequence's newest token over one segment of its context: OUT (T, heads, DV), or where there are several
    segments PARTS (B, heads, SEGMENTS, DVP) float32, not normalised, with the maximum and the sum that belong to it."""
    span, hk, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(KV_LENS + span)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, kv_len - window) // BN * BN
    length = _segment_length(kv_len - begin, SEGMENTS, LEAST_SEGMENT, BN)
    low = begin + segment * length
    if (segment > 0) & (low >= kv_len):
        return
    r = tl.arange(0, BM)
    row_ok = r < G
    head = hk * G + r % G
    row = (tl.load(ROWS + span) + r * 0).to(tl.int64)
    position = kv_len - 1 + r * 0
    q, q_rest = _queries(Q, row, head, row_ok, q_token, q_head, DK, D1, D2, IN_FLOAT32)
    table = TABLES + tl.load(TABLE_ROWS + span).to(tl.int64) * table_width
    high = tl.minimum(low + length, kv_len)
    out, maximum, total = _attend(
        q, q_rest, KEYS, VALUES, table, low, high, position - window + 1, position + 1, row_ok, hk, scale, softcap,
        HK, DK, D1, D2, DV, DVP, BLOCK, BM, BN, HAS_WINDOW, HAS_SOFTCAP, AS_BITS,
    )  # fmt: skip
    dv = tl.arange(0, DVP)
    mask = row_ok[:, None] & (dv < DV)[None, :]
    if kv_len - begin > length:
        part = (span.to(tl.int64) * (HK * G) + head) * SEGMENTS + segment
        tl.store(PART_MAX + part, maximum, mask=row_ok)
        tl.store(PART_SUM + part, total, mask=row_ok)
        tl.store(PARTS + part[:, None] * DVP + dv[None, :], out, mask=mask)
    else:
        if HAS_SINKS:
            out, total = _with_sinks(out, maximum, total, SINKS, head, row_ok)
        out = out * (v_scale / tl.where(total > 0, total, 1.0))[:, None]  # padding has seen nothing
        where = OUT + row[:, None] * o_token + head[:, None] * o_head + dv[None, :]
        tl.store(where, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["table_width", "window"])
def prompt_kernel(
    Q, KEYS, VALUES, OUT, TABLES, TABLE_ROWS, KV_LENS, ROWS, Q_LENS, TILE_SPAN, TILE_FIRST, ROW_BOUNDS, SINKS,
    q_token, q_head, o_token, o_head, table_width, scale, v_scale, softcap, window,
    G: tl.constexpr, HK: tl.constexpr, DK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_BOUNDS: tl.constexpr, IN_FLOAT32: tl.constexpr,
    AS_BITS: tl.constexpr,
):  # fmt: skip
    """A tile of a prompt's chunk over all that its tokens see: OUT (T, heads, DV)."""
    tile, hk = tl.program_id(0), tl.program_id(1)
    span, first = tl.load(TILE_SPAN + tile), tl.load(TILE_FIRST + tile)
    kv_len, q_len = tl.load(KV_LENS + span), tl.load(Q_LENS + span)
    r = tl.arange(0, BM)
    token = first + r // G
    row_ok = (r < BM // G * G) & (token < q_len)
    head = hk * G + r % G
    row = (tl.load(ROWS + span) + token).to(tl.int64)
    position = kv_len - q_len + token
    firsts, ends = position - window + 1, position + 1
    low, high = kv_len - q_len + first - window + 1, tl.minimum(kv_len - q_len + first + BM // G, kv_len)
    if HAS_BOUNDS:
        ends = tl.load(ROW_BOUNDS + row * 2, mask=row_ok, other=0)
        high = tl.max(ends, 0)
        firsts = tl.minimum(firsts, tl.load(ROW_BOUNDS + row * 2 + 1, mask=row_ok, other=NOWHERE))
        low = tl.minimum(low, tl.min(firsts, 0))
    low = tl.maximum(0, low) // BN * BN if HAS_WINDOW else 0
    q, q_rest = _queries(Q, row, head, row_ok, q_token, q_head, DK, D1, D2, IN_FLOAT32)
    table = TABLES + tl.load(TABLE_ROWS + span).to(tl.int64) * table_width
    out, maximum, total = _attend(
        q, q_rest, KEYS, VALUES, table, low, high, firsts, ends, row_ok, hk, scale, softcap,
        HK, DK, D1, D2, DV, DVP, BLOCK, BM, BN, HAS_WINDOW, HAS_SOFTCAP, AS_BITS,
    )  # fmt: skip
    if HAS_SINKS:
        out, total = _with_sinks(out, maximum, total, SINKS, head, row_ok)
    out = out * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    dv = tl.arange(0, DVP)
    where = OUT + row[:, None] * o_token + head[:, None] * o_head + dv[None, :]
    tl.store(where, out.to(OUT.dtype.element_ty), mask=row_ok[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["window"])
def combine_kernel(
    PARTS, PART_MAX, PART_SUM, OUT, KV_LENS, ROWS, SINKS, o_token, o_head, v_scale, window,
    HEADS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, SEGMENTS: tl.constexpr,
    LEAST_SEGMENT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """A decode's segments put together, one head of one row; nothing to do where there was one segment."""
    span, head = tl.program_id(0), tl.program_id(1)
    kv_len = tl.load(KV_LENS + span)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(0, kv_len - window) // BN * BN
    length = _segment_length(kv_len - begin, SEGMENTS, LEAST_SEGMENT, BN)
    num_segments = (kv_len - begin + length - 1) // length
    if num_segments <= 1:
        return
    segment, dv = tl.arange(0, SEGMENTS), tl.arange(0, DVP)
    there = segment < num_segments
    part = (span.to(tl.int64) * HEADS + head) * SEGMENTS + segment
    maxima = tl.load(PART_MAX + part, mask=there, other=NEGATIVE)
    sums = tl.load(PART_SUM + part, mask=there, other=0.0)
    mask = there[:, None] & (dv < DV)[None, :]
    parts = tl.load(PARTS + part[:, None] * DVP + dv[None, :], mask=mask, other=0.0)
    maximum = tl.max(maxima, 0)
    sink = maximum
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2_E
        maximum = tl.maximum(maximum, sink)
    weights = tl.exp2(maxima - maximum)
    total = tl.sum(sums * weights, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - maximum)
    out = tl.sum(parts * weights[:, None], 0) * (v_scale / total)
    row = tl.load(ROWS + span).to(tl.int64)
    tl.store(OUT + row * o_token + head * o_head + dv, out.to(OUT.dtype.element_ty), mask=dv < DV)
