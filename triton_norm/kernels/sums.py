"""Gradients of parameters that many rows share: sums over columns' rows, over programs, and over sets of rows."""

from . import tl, triton
from .backward import normalized_of, through_activation, through_bits
from .structs import Activation, Operands, Sizes, Strides
from .tiles import (
    affine_at,
    columns,
    load_columns,
    load_statistics,
    load_tile,
    load_weight,
    offsets,
    row_block,
    sample_of,
    store_columns,
    tile_of,
    walked,
    zeros,
)


@triton.jit
def column_gradients(
    x, dy, dweight, dbias, residual, bits, statistics, weight, bias,
    G, K, S, rows, per_sample, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    INVERSE: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of an affine per column where a row is too long for one program, to (shares, columns) each.

    Grid (tiles of a row, shares): a program stays in its columns and walks ``steps`` blocks of rows. See ``sample_of``
    for samples with affines of their own.
    """
    # An affine per column has no channels.
    sizes = Sizes(G, K, S, rows, 1, per_sample, None)
    x_strides = Strides(x_a, x_g, x_k, x_s, None)
    y_strides = Strides(y_a, y_g, y_k, y_s, None)
    index = tl.program_id(0)
    k, s = columns(index, S, BLOCK.K, BLOCK.S)
    a = sample_of(tl.program_id(1), sizes)
    w = load_columns(weight, a, k, s, sizes, 1.0, ACC)
    w = load_weight(w, None, None, None, sizes, NORM, ACC)
    b = load_columns(bias, a, k, s, sizes, 0.0, ACC)
    first, last = walked(tl.program_id(1), a, blocks, steps, sizes)
    sum_dzx = zeros(BLOCK, ACC)
    sum_dz = zeros(BLOCK, ACC)
    for block in range(first, last):
        of = row_block(block, sizes, BLOCK, NORM, LAYOUT)
        tile = tile_of(of, index, sizes, BLOCK, LAYOUT)
        at = offsets(of, tile, y_strides, LAYOUT)
        dz = load_tile(dy, at, tile, ACC)
        values = load_tile(x, offsets(of, tile, x_strides, LAYOUT), tile, ACC)
        mean, rstd = load_statistics(statistics, of, sizes, NORM)
        if bits is not None:
            dz = through_bits(dz, bits, of, tile, sizes, Activation(None, DERIVATIVE, P0, P1, ON, OFF), BLOCK)
        else:
            dz, _ = through_activation(
                dz, values, mean, rstd, w, b, Operands(x, residual, None, None, None), of, tile, at,
                Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST), ACC,
            )  # fmt: skip
        if dweight is not None:
            sum_dzx += dz * normalized_of(
                values, mean, rstd, w, b, tile,
                Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST), ACC,
            )  # fmt: skip
        if dbias is not None:
            sum_dz += dz
    store_columns(dweight, sum_dzx, tl.program_id(1), k, s, sizes)
    store_columns(dbias, sum_dz, tl.program_id(1), k, s, sizes)


@triton.jit
def shared_sums(
    partials, totals, weight, rows, channels, per_sample, P, sets, members, set_step, member_step,
    R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ g x̂ and Σ g, to totals (2, sets), of rows that share their statistics, from sums of dz, (2, P, rows).

    Row ``i * set_step + j * member_step`` is member j of set i. Grid (blocks of R sets,).
    """
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    plane = tl.full((), 1, tl.int64) * P * rows
    sum_dx = tl.zeros((R, BLOCK), ACC)
    sum_d = tl.zeros((R, BLOCK), ACC)
    for start in range(0, P * members, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (i < sets)[:, None] & (j < P * members)[None, :]
        row = (i * set_step)[:, None] + (j % members)[None, :].to(tl.int64) * member_step
        at = (j // members).to(tl.int64)[None, :] * rows + row
        w = tl.full((R, BLOCK), 1, ACC)
        if weight is not None:
            w = tl.load(weight + affine_at(row, row % channels, channels, per_sample), mask=mask, other=0.0).to(ACC)
            if NORM.UNIT:
                w += 1.0
        sum_dx += w * tl.load(partials + at, mask=mask, other=0.0)
        sum_d += w * tl.load(partials + plane + at, mask=mask, other=0.0)
    tl.store(totals + i, tl.sum(sum_dx, 1), mask=i < sets)
    tl.store(totals + sets + i, tl.sum(sum_d, 1), mask=i < sets)


@triton.jit
def _store_sum(total, target, total_at, at_m, M):
    summed = tl.sum(total, 0)
    if target is not None:
        tl.store(target + at_m, summed, mask=at_m < M)
    if total_at is not None:
        tl.store(total_at + at_m, summed, mask=at_m < M)


@triton.jit
def column_sums(
    source, totals, first, second, third, L, M, Q: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums each of Q (L, M) planes of source over L. Grid (M blocks,).

    The sums go to the parameters' gradients that are wanted and, where a later pass needs them, to ``totals`` (Q, M).
    Planes are walked together: there are few programs, whose time is what they wait for memory.
    """
    FIRST: tl.constexpr = first is not None or totals is not None
    SECOND: tl.constexpr = second is not None or totals is not None
    THIRD: tl.constexpr = third is not None or (totals is not None and Q == 3)
    at_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.full((), 1, tl.int64) * L * M
    sum_0 = tl.zeros((BLOCK_L, BLOCK_M), ACC)
    sum_1 = tl.zeros((BLOCK_L, BLOCK_M), ACC)
    sum_2 = tl.zeros((BLOCK_L, BLOCK_M), ACC)
    for start in range(0, L, BLOCK_L):
        at_l = start + tl.arange(0, BLOCK_L)
        at = at_l.to(tl.int64)[:, None] * M + at_m[None, :]
        mask = (at_l < L)[:, None] & (at_m < M)[None, :]
        if FIRST:
            sum_0 += tl.load(source + at, mask=mask, other=0.0)
        if SECOND:
            sum_1 += tl.load(source + plane + at, mask=mask, other=0.0)
        if THIRD:
            sum_2 += tl.load(source + 2 * plane + at, mask=mask, other=0.0)
    total_at = totals
    if FIRST:
        _store_sum(sum_0, first, total_at, at_m, M)
    if SECOND:
        if totals is not None:
            total_at = totals + M
        _store_sum(sum_1, second, total_at, at_m, M)
    if THIRD:
        if totals is not None:
            total_at = totals + 2 * M
        _store_sum(sum_2, third, total_at, at_m, M)
