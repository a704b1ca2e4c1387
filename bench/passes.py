"""How often a tensor's elements cross memory: the fewest times possible, and what PyTorch eager needs.

One pass reads or writes every element once, so passes x itemsize is bytes per element. Per-channel parameters and
statistics are left out. The eager operators, as PyTorch's CUDA kernels are written, caches not counted (where PyTorch
hands a batch norm to cuDNN, that may move less):

| operator                  | forward                       | backward                           |
|---------------------------|-------------------------------|------------------------------------|
| batch, instance, group    | x for the statistics; x, y    | x, dy for the sums; x, dy, dx      |
| layer and RMS norm        | the same                      | the same; x, dy for the parameters |
| group norm, channels_last | x, its contiguous copy        | none                               |
| layer norm of channels,   | x, its permuted copy          | dy, its permuted copy              |
|   of a contiguous input   |                               |                                    |
| (N, C) scale and shift    | y, product; product, sum      | dy; dy, dnorm; dy, y, dy * y, which|
|                           |                               | is read again                      |
| scale and shift like x    | scale, 1 + scale; y, that,    | dy, 1 + scale, dnorm;              |
|                           | product; product, shift, sum  | dy, y, dscale                      |
| residual, added in place  | y, residual, y                | none: both gradients are dy        |
| activation, in place      | y, y                          | y, dy, dz                          |
| reflection pad            | y, padded                     | zero-fill of dy; padded, and for   |
|                           |                               | each an atomic add (read, write)   |
| unpadded result wanted    | none                          | the two gradients, their sum       |
| added before the norm     | x, that, their sum            | the two gradients, their sum       |

In inference a norm does not read x for statistics.
"""

from .shapes import Shape

DIRECTIONS = ("forward", "backward", "both")
#: The forward pass with given statistics.
INFERENCE = "inference"


def _passes(inference: float, forward: float, backward: float) -> dict[str, float]:
    return {INFERENCE: inference, "forward": forward, "backward": backward, "both": forward + backward}


def _outputs(shape: Shape) -> float:
    """Passes that write (or read the gradient of) the results."""
    if not shape.padding:
        return 1.0
    return shape.padded_elements / shape.elements + shape.unpadded


def minimum(shape: Shape) -> dict[str, float]:
    """Every input read once, every output written once; an activation's backward needs no more than a norm's."""
    # Without an activation the residual's gradient is dy itself, unless dy first has to be gathered from its padding.
    dresidual = shape.residual and (shape.activation is not None or shape.padding > 0)
    forward = 1 + shape.residual + _outputs(shape)
    backward = 1 + _outputs(shape) + 1 + dresidual
    if shape.form == "element":
        forward += 2
        # The scale, and the gradients of both.
        backward += 1 + 2
    if shape.pre_residual:
        # The addend and the sum; the sum's gradient.
        forward, backward = forward + 2, backward + 1
    return _passes(forward, forward, backward)


def eager(shape: Shape) -> dict[str, float]:
    """What PyTorch's own operators move; see the table above."""
    padded = shape.padded_elements / shape.elements
    forward = 3.0 + 3 * shape.residual + 2 * (shape.activation is not None)
    backward = 5.0 + 3 * (shape.activation is not None)
    if shape.kind in ("layer", "rms", "channels") and not shape.adaptive:
        backward += 2
    if shape.kind == "channels" and shape.layout == "contiguous":
        forward += 2
        backward += 2
    if shape.kind == "group" and shape.layout == "channels_last":
        forward += 2
    more = {"channel": (0, 0), "sample": (4, 7), "element": (8, 6)}[shape.form]
    forward, backward = forward + more[0], backward + more[1]
    if shape.padding:
        forward += 1 + padded
        backward += 1 + 3 * padded + 3 * shape.unpadded
    if shape.pre_residual:
        forward += 3
        backward += 3
    return _passes(forward - 1, forward, backward)
