"""Backward, with the pre-activation z recomputed from x and the saved statistics.

With dz = act'(z) dy, g = dz * weight and x̂ = (x - mean) * rstd, for a row or group of n elements:

    dx = rstd * (g - Σ g / n - x̂ * Σ g x̂ / (n - correction))      statistics of the row itself
    dx = rstd * g                                                 given statistics (eval)
    dweight = Σ dz x̂,  dbias = Σ dz,  dslope = Σ dy min(z, 0),  dresidual = dz

without Σ g where no mean is subtracted. Where the weight is constant on all that shares its statistics, Σ dz and
Σ dz x̂ of a row serve both dx and, summed over the rows of a channel, the parameters. There are no atomics, and every
result is bitwise repeatable. Sums lie as (Q, ..., rows): Σ dz x̂ (or Σ g x̂), Σ dz (or Σ g), then dslope. Parameters
into which a single row sums get their gradients from the kernel that has the sum.
"""

from . import tl, triton
from .padding import load_folded
from .structs import Activation, Gradients, Operands, Sizes, Strides, Tile, Upstream
from .tiles import (
    COLUMN,
    ELEMENT,
    ROW,
    columns,
    dense_offsets,
    load_affine,
    load_bits,
    load_columns,
    load_rows,
    load_statistics,
    load_tile,
    load_weight,
    offsets,
    over_group,
    row_block,
    row_length,
    sample_of,
    statistics_at,
    store_columns,
    store_tile,
    tile_of,
    walked,
    zeros,
)


@triton.jit
def load_upstream(
    upstream, rows, tile, at, sizes, y_strides, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """A tile of the gradient of what the forward pass wrote."""
    if PAD is None:
        return load_tile(upstream.dy, at, tile, ACC)
    else:
        d = load_folded(upstream.dy, rows, tile, sizes, y_strides, PAD, ACC, LAYOUT)
        if upstream.dsecond is not None:
            d += load_tile(upstream.dsecond, at, tile, ACC)
        return d


@triton.jit
def through_bits(d, bits, rows, tile, sizes, activation, BLOCK: tl.constexpr):
    """dz where one bit an element stands for z: neither x nor the residual is read for it."""
    on = load_bits(bits, rows, tile, sizes, BLOCK)
    return d * tl.where(on, tl.full(d.shape, activation.ON, d.dtype), tl.full(d.shape, activation.OFF, d.dtype))


@triton.jit
def pre_activation(values, mean, rstd, w, b, activation):
    """z without the residual. Weight and bias, w and b, are what was loaded of them."""
    if activation.INVERSE is not None:
        return activation.INVERSE(values, activation.P0, activation.P1, activation.LEAST)
    else:
        # The same expression as in the forward pass, so that z rounds to the same side of an activation's corner.
        return (values - mean) * (rstd * w) + b


@triton.jit
def normalized_of(values, mean, rstd, w, b, tile, activation, ACC: tl.constexpr):
    """x̂, from x or, where y was kept in its place, from that; 0 where there is no element.

    NaN, which nobody takes for a gradient, where too little of x̂ is left in y.
    """
    normalized = values - mean
    if activation.INVERSE is not None:
        # There may be no weight or bias, whose numbers are no tensors then.
        w = tl.zeros((1, 1), ACC) + w
        b = tl.zeros((1, 1), ACC) + b
        lost = tl.abs(w) < tl.abs(b) * activation.LIMIT + activation.FLOOR
        over_w = tl.where(lost, float("nan"), 1.0 / tl.where(lost, 1.0, w))
        normalized = (pre_activation(values, mean, rstd, w, b, activation) - b) * over_w
    else:
        normalized = normalized * rstd
    return tl.where(tile.mask, normalized, 0.0)


@triton.jit
def through_activation(
    d, values, mean, rstd, w, b, operands, rows, tile, at, activation, ACC: tl.constexpr
):  # fmt: skip
    """dz, and the integrand of the slope's gradient."""
    z = pre_activation(values, mean, rstd, w, b, activation)
    if operands.residual is not None:
        z += load_tile(operands.residual, at, tile, ACC)
    if operands.slope is not None:
        slope = load_rows(operands.slope, rows.channel, rows.live, 0.0, ACC)
        return d * activation.DERIVATIVE(z, slope, activation.P1), d * tl.where(z > 0, 0.0, z)
    else:
        return d * activation.DERIVATIVE(z, activation.P0, activation.P1), d


@triton.jit
def store_elements(gradients, dz, normalized, at, tile):
    """The gradients of an affine with a weight and a bias for each element."""
    if gradients.dweight is not None:
        store_tile(gradients.dweight, at, tile, dz * normalized)
    if gradients.dbias is not None:
        store_tile(gradients.dbias, at, tile, dz)


@triton.jit
def store_parameters(gradients, sum_dzx, sum_dz, sum_ds, rows, NORM: tl.constexpr):
    """The gradients of those parameters that no two rows share, contiguous: of an affine per row, and of slopes.

    There are as many of them as rows, so a row's index is where they are.
    """
    if NORM.AFFINE == ROW:
        if gradients.dweight is not None:
            tl.store(gradients.dweight + rows.index, sum_dzx, mask=rows.live)
        if gradients.dbias is not None:
            tl.store(gradients.dbias + rows.index, sum_dz, mask=rows.live)
    if gradients.dslope is not None:
        tl.store(gradients.dslope + rows.index, sum_ds, mask=rows.live)


@triton.jit
def store_dx(pointer, upstream, at, tile, value, PAD: tl.constexpr, ACC: tl.constexpr):
    """The gradient of x or, where something was added to it, of both: the sum's own gradient comes on top."""
    if PAD is None:
        if upstream.dsecond is not None:
            value += load_tile(upstream.dsecond, at, tile, ACC)
    store_tile(pointer, at, tile, value)


@triton.jit
def differentiate_rows(
    block, operands, upstream, gradients, bits, statistics, sums, sizes, x_strides, y_strides, activation,
    BLOCK: tl.constexpr, NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """One block of whole rows, in registers. Returns dz and x̂."""
    rows = row_block(block, sizes, BLOCK, NORM, LAYOUT)
    tile = tile_of(rows, 0, sizes, BLOCK, LAYOUT)
    x_at = offsets(rows, tile, x_strides, LAYOUT)
    at = dense_offsets(rows, tile, x_strides, y_strides, PAD, LAYOUT)
    dz = load_upstream(upstream, rows, tile, at, sizes, y_strides, PAD, ACC, LAYOUT)
    if bits is not None:
        # Before x is read: fewer values are alive while the bits are spread over the tile.
        dz = through_bits(dz, bits, rows, tile, sizes, activation, BLOCK)
        if gradients.dresidual is not None:
            store_tile(gradients.dresidual, at, tile, dz)
    values = load_tile(operands.x, x_at, tile, ACC)
    mean, rstd = load_statistics(statistics, rows, sizes, NORM)
    w = load_weight(operands.weight, at, rows, tile, sizes, NORM, ACC)
    ds = dz
    b = 0.0
    if bits is None:
        b = load_affine(operands.bias, at, rows, tile, sizes, 0.0, NORM, ACC)
        dz, ds = through_activation(dz, values, mean, rstd, w, b, operands, rows, tile, at, activation, ACC)
        if gradients.dresidual is not None:
            store_tile(gradients.dresidual, at, tile, dz)
    normalized = normalized_of(values, mean, rstd, w, b, tile, activation, ACC)
    d = dz
    if NORM.AFFINE != ROW:
        if NORM.AFFINE == ELEMENT:
            store_elements(gradients, dz, normalized, at, tile)
        d = dz * w
    sum_d = tl.sum(d, 1)
    sum_dx = tl.sum(d * normalized, 1)
    if NORM.AFFINE != COLUMN:
        sum_ds = sum_d
        if operands.slope is not None:
            sum_ds = tl.sum(ds, 1)
        if sums is not None:
            tl.store(sums + rows.index, sum_dx, mask=rows.live)
            tl.store(sums + sizes.rows + rows.index, sum_d, mask=rows.live)
            if operands.slope is not None:
                tl.store(sums + 2 * sizes.rows + rows.index, sum_ds, mask=rows.live)
        store_parameters(gradients, sum_dx, sum_d, sum_ds, rows, NORM)
    if gradients.dx is not None:
        if FOLDED and PAD is None:
            # One offset an element is too much to keep alive across the sums, and the compiler would keep it. The
            # grid has a single row of programs, but the compiler does not know, so it computes these anew.
            nothing = tl.num_programs(1) - 1
            again = Tile(0, tile.k + nothing, tile.s + nothing, tile.mask)
            at = offsets(rows, again, y_strides, LAYOUT)
        n = row_length(sizes, ACC) * NORM.GROUP
        mean_d = (sum_d / n)[:, None]
        mean_dx = (sum_dx / (n - NORM.CORRECTION))[:, None]
        scale = rstd
        if NORM.AFFINE == ROW:
            if NORM.GROUP > 1:
                # The weight differs between the rows that share their statistics.
                d = d * w
                mean_d = mean_d * w
                mean_dx = mean_dx * w
            else:
                scale = rstd * w
        mean_d = over_group(mean_d, NORM)
        mean_dx = over_group(mean_dx, NORM)
        d = d - normalized * mean_dx
        if NORM.CENTERED:
            d = d - mean_d
        store_dx(gradients.dx, upstream, at, tile, d * scale, PAD, ACC)
    return dz, normalized


@triton.jit
def persistent_backward(
    x, dy, dsecond, dx, dresidual, dweight, dbias, dslope, residual, bits, statistics, sums, weight, bias, slope,
    G, K, S, rows, channels, per_sample, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    INVERSE: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: x and dy read once, dx written once. Grid (row blocks,).

    Gradients of an affine per row, and dslope, are given only where each row has parameters of its own; otherwise the
    rows' ``sums`` (Q, rows) are.

    With an affine per column, grid (row blocks / steps,): a program goes through ``steps`` blocks and writes its share
    of the gradients of weight and bias, which is small against what it reads, to dweight and dbias (programs, columns).
    See ``sample_of`` for samples with affines of their own.
    """
    # A row so long that one fills the registers leaves none for the bias, which is loaded again for each.
    LONG: tl.constexpr = BLOCK.K * BLOCK.S > 4096 or (residual is not None and BLOCK.K * BLOCK.S > 2048)
    upstream = Upstream(dy, dsecond)
    sizes = Sizes(G, K, S, rows, channels, per_sample, H)
    x_strides = Strides(x_a, x_g, x_k, x_s, None)
    y_strides = Strides(y_a, y_g, y_k, y_s, y_d)
    if NORM.AFFINE == COLUMN:
        a = sample_of(tl.program_id(0), sizes)
        k, s = columns(0, S, BLOCK.K, BLOCK.S)
        # Where x̂ is recovered by them, both are needed at more places than there are registers for.
        RELOADED: tl.constexpr = LONG and INVERSE is not None
        if not RELOADED:
            weight_columns = load_columns(weight, a, k, s, sizes, 1.0, ACC)
        if not LONG:
            bias_columns = load_columns(bias, a, k, s, sizes, 0.0, ACC)
        sum_dzx = zeros(BLOCK, ACC)
        sum_dz = zeros(BLOCK, ACC)
        first, last = walked(tl.program_id(0), a, blocks, steps, sizes)
        for block in range(first, last):
            if RELOADED:
                w = load_columns(weight, a, k, s, sizes, 1.0, ACC)
            else:
                w = weight_columns
            if LONG:
                b = load_columns(bias, a, k, s, sizes, 0.0, ACC)
            else:
                b = bias_columns
            dz, normalized = differentiate_rows(
                block, Operands(x, residual, w, b, slope), upstream, Gradients(dx, dresidual, None, None, None),
                bits, statistics, sums, sizes, x_strides, y_strides,
                Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST),
                BLOCK, NORM, PAD, ACC, LAYOUT, FOLDED,
            )  # fmt: skip
            if dweight is not None:
                sum_dzx += dz * normalized
            if dbias is not None:
                sum_dz += dz
        store_columns(dweight, sum_dzx, tl.program_id(0), k, s, sizes)
        store_columns(dbias, sum_dz, tl.program_id(0), k, s, sizes)
    else:
        differentiate_rows(
            tl.program_id(0), Operands(x, residual, weight, bias, slope), upstream,
            Gradients(dx, dresidual, dweight, dbias, dslope),
            bits, statistics, sums, sizes, x_strides, y_strides,
            Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST),
            BLOCK, NORM, PAD, ACC, LAYOUT, FOLDED,
        )  # fmt: skip


@triton.jit
def row_total(sums, plane: tl.constexpr, rows, sizes, P, BLOCK_P: tl.constexpr):
    """Each row's total, from that plane's (P, rows) sums of the programs that shared it."""
    sums += tl.full((), plane, tl.int64) * P * sizes.rows
    p = tl.arange(0, BLOCK_P)
    at = p.to(tl.int64)[None, :] * sizes.rows + rows.index[:, None]
    return tl.sum(tl.load(sums + at, mask=rows.live[:, None] & (p < P)[None, :], other=0.0), 1)


@triton.jit
def gradient(
    x, dy, dsecond, dx, dresidual, dweight, dbias, dslope, residual, bits, statistics, mean, variance, sums, partials,
    weight, bias, slope,
    G, K, S, rows, channels, per_sample, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    INVERSE: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One pass over x and dy, P programs sharing R rows. Grid (row blocks, P).

    With ``partials`` it writes each program's sums to (Q, P, rows). With ``dx``, ``dresidual`` or the gradients of an
    affine per element it writes those, using the ``sums`` of an earlier pass unless the statistics are given (eval):
    (Q, P, rows) or, where rows share their statistics, (Q, those), of g then, not of dz, unless one weight serves all.
    The pass that has sums runs backwards, to meet in L2 what the pass before it read last.

    Gradients of an affine per row, and dslope, are given only where each row has parameters of its own: to the pass
    that totals the (Q, P, rows) sums, or to one without sums whose programs have rows to themselves.
    """
    # Whether the sums are those of g: not where the weight is the same for all that shares a mean.
    WEIGHTED: tl.constexpr = NORM.AFFINE != ROW or NORM.GROUP > 1 or (NORM.PER_CHANNEL and per_sample is not None)
    BY_ROW: tl.constexpr = dslope is not None or (NORM.AFFINE == ROW and (dweight is not None or dbias is not None))
    SUMS: tl.constexpr = partials is not None or (sums is None and BY_ROW)
    upstream = Upstream(dy, dsecond)
    gradients = Gradients(dx, dresidual, dweight, dbias, dslope)
    sizes = Sizes(G, K, S, rows, channels, per_sample, H)
    x_strides = Strides(x_a, x_g, x_k, x_s, None)
    y_strides = Strides(y_a, y_g, y_k, y_s, y_d)
    share = tl.program_id(1)
    block = tl.program_id(0)
    if sums is not None:
        share = tl.num_programs(1) - 1 - share
        block = tl.num_programs(0) - 1 - block
    of = row_block(block, sizes, BLOCK, NORM, LAYOUT)
    if NORM.AFFINE == ROW:
        # Ahead of the loop, in each turn of which they would have to be waited for.
        weight_of_row = load_weight(weight, None, of, None, sizes, NORM, ACC)
        bias_of_row = 0.0
        if bits is None:
            bias_of_row = load_affine(bias, None, of, None, sizes, 0.0, NORM, ACC)
    if mean is not None:
        center = load_rows(mean, of.channel, of.live, 0.0, ACC)
        rstd = tl.rsqrt(load_rows(variance, of.channel, of.live, 1.0, ACC) + eps)
    else:
        center, rstd = load_statistics(statistics, of, sizes, NORM)
    if sums is not None:
        n = row_length(sizes, ACC) * NORM.GROUP
        if NORM.PER_CHANNEL:
            n = n * (rows // channels)
        if NORM.PER_CHANNEL or NORM.GROUP > 1:
            place, total = statistics_at(of, sizes, NORM)
            sum_dx = tl.load(sums + place, mask=of.live, other=0.0)
            sum_d = tl.load(sums + total + place, mask=of.live, other=0.0)
        else:
            sum_dx = row_total(sums, 0, of, sizes, P, BLOCK_P)
            sum_d = row_total(sums, 1, of, sizes, P, BLOCK_P)
        mean_dx = (sum_dx / (n - NORM.CORRECTION))[:, None]
        mean_d = (sum_d / n)[:, None]
        if BY_ROW:
            if share == 0:
                # Loaded again: were the totals above stored, their layout would be the store's, also where the tiles
                # need them, and every tile would go through shared memory. Ahead of the loop this takes no registers.
                row_dx = row_total(sums, 0, of, sizes, P, BLOCK_P)
                row_d = row_total(sums, 1, of, sizes, P, BLOCK_P)
                row_ds = row_d
                if dslope is not None:
                    row_ds = row_total(sums, 2, of, sizes, P, BLOCK_P)
                store_parameters(gradients, row_dx, row_d, row_ds, of, NORM)
    if SUMS:
        sums_dx = zeros(BLOCK, ACC)
        sums_d = zeros(BLOCK, ACC)
        if slope is not None:
            sums_ds = zeros(BLOCK, ACC)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        index = step
        if sums is not None:
            index = first + last - 1 - step
        tile = tile_of(of, index, sizes, BLOCK, LAYOUT)
        x_at = offsets(of, tile, x_strides, LAYOUT)
        at = dense_offsets(of, tile, x_strides, y_strides, PAD, LAYOUT)
        dz = load_upstream(upstream, of, tile, at, sizes, y_strides, PAD, ACC, LAYOUT)
        values = load_tile(x, x_at, tile, ACC)
        w = weight
        b = bias
        if NORM.AFFINE == COLUMN:
            w = load_columns(weight, of.a, tile.k, tile.s, sizes, 1.0, ACC)
            b = load_columns(bias, of.a, tile.k, tile.s, sizes, 0.0, ACC)
        if NORM.AFFINE == ROW:
            w = weight_of_row
            b = bias_of_row
        else:
            w = load_weight(w, at, of, tile, sizes, NORM, ACC)
            if bits is None:
                b = load_affine(b, at, of, tile, sizes, 0.0, NORM, ACC)
        ds = dz
        if bits is not None:
            dz = through_bits(dz, bits, of, tile, sizes, Activation(None, DERIVATIVE, P0, P1, ON, OFF), BLOCK)
        else:
            dz, ds = through_activation(
                dz, values, center, rstd, w, b, Operands(x, residual, None, None, slope), of, tile, at,
                Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST), ACC,
            )  # fmt: skip
        normalized = normalized_of(
            values, center, rstd, w, b, tile,
            Activation(None, DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST), ACC,
        )  # fmt: skip
        if NORM.AFFINE == ELEMENT:
            store_elements(gradients, dz, normalized, at, tile)
        if dresidual is not None:
            store_tile(dresidual, at, tile, dz)
        if SUMS:
            d = dz
            if NORM.AFFINE != ROW:
                d = dz * w
            sums_dx += d * normalized
            sums_d += d
            if slope is not None:
                sums_ds += ds
        if dx is not None:
            if sums is None:
                store_tile(dx, at, tile, dz * (rstd * w))
            else:
                d = dz
                scale = rstd
                if WEIGHTED:
                    d = dz * w
                else:
                    scale = rstd * w
                if NORM.CENTERED:
                    d -= mean_d
                store_dx(dx, upstream, at, tile, (d - normalized * mean_dx) * scale, PAD, ACC)
    if SUMS:
        row_dx = tl.sum(sums_dx, 1)
        row_d = tl.sum(sums_d, 1)
        row_ds = row_d
        if slope is not None:
            row_ds = tl.sum(sums_ds, 1)
        if partials is not None:
            to = share.to(tl.int64) * rows + of.index
            plane = tl.num_programs(1).to(tl.int64) * rows
            tl.store(partials + to, row_dx, mask=of.live)
            tl.store(partials + plane + to, row_d, mask=of.live)
            if slope is not None:
                tl.store(partials + 2 * plane + to, row_ds, mask=of.live)
        store_parameters(gradients, row_dx, row_d, row_ds, of, NORM)
