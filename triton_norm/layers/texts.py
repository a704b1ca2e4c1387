"""What docstrings of layers have in common, written once: ``{name}`` on a line of its own stands for the text here."""

from inspect import cleandoc
from textwrap import fill

__all__ = ["composed"]

_ACTIVATION = """
activation: None, a name (``triton_norm.types.ActivationName``), or an instance of a ``torch.nn`` activation, whose
    parameters are then used; the slope of ``nn.PReLU`` is a parameter of this module then. May be changed later.
"""
_PADDING = """
padding: An int for all sides, or torch's (left, right, top, bottom, ...) over the spatial dims.
padding_mode: "reflect", "replicate", "circular" or "zeros".
"""
_MEMORY = """
memory_efficient: Whether the backward pass starts from the result, so that the input is not kept for it: what that
    needs, and what gradients lose, is said in ``tn.functional.batch_norm``. May be changed later.
"""
_CALL = """
Called as ``m({operands}residual=None)``; the result has the input's shape, dtype and memory format{more}. Inputs are of
float16, bfloat16, float32 or float64 and of any strides; statistics are taken in float32, of float64 input in float64.
Any other argument of a call counts in place of the module's own setting, for this call alone, as in
``tn.functional.{function}``, and raises what it raises: ``ValueError`` for what does not fit, and torch's own errors;
buffers are unchanged then.
"""
_BATCH = """
Mean and variance are those of a channel: in training of the batch, in evaluation the running ones. Ioffe and Szegedy,
"Batch Normalization" (2015).

Args:
    num_features, eps, momentum, affine, track_running_stats, device, dtype: those of torch's class of this name.
    bias: Whether there is one; on every release of torch.
    {options}

{call of batch norm}
"""
_INSTANCE = """
Mean and variance are those of a sample's channel. Ulyanov et al., "Instance Normalization: The Missing Ingredient for
Fast Stylization" (2016).

Args:
    num_features, eps, momentum, affine, track_running_stats, device, dtype: those of torch's class of this name.
    bias: Whether there is one; on every release of torch.
    {options}

{call of instance norm}
With ``unbiased=True`` the variance is a sum over n - 1.
"""


def _call(function: str, operands: str = "x, ", pads: bool = True) -> str:
    more = ", plus padding, and there are two with ``return_unpadded=True``, (padded, unpadded)" if pads else ""
    text = _CALL.replace("{function}", function).replace("{operands}", operands).replace("{more}", more)
    return fill(text.strip(), 116)


_TEXTS = {
    "{batch norm}": _BATCH,
    "{instance norm}": _INSTANCE,
    "{options}": _ACTIVATION + _PADDING.lstrip() + _MEMORY.lstrip(),
    "{options without memory_efficient}": _ACTIVATION + _PADDING.lstrip(),
    "{options without padding}": _ACTIVATION + _MEMORY.lstrip(),
    "{call of batch norm}": _call("batch_norm"),
    "{call of instance norm}": _call("instance_norm"),
    "{call of group norm}": _call("group_norm"),
    "{call of layer norm}": _call("layer_norm", pads=False),
    "{call of rms norm}": _call("rms_norm", pads=False),
    "{call of AdaIN}": _call("instance_norm", "x, scale, shift, "),
    "{call of conditional batch norm}": _call("batch_norm", "x, labels, "),
    "{call of SPADE}": _call("batch_norm", "x, gamma, beta, "),
}


def composed(doc: str) -> str:
    """The docstring with the texts that its lines in braces stand for."""
    lines = []
    for line in cleandoc(doc).splitlines():
        text = _TEXTS.get(line.strip())
        indent = line[: len(line) - len(line.lstrip())]
        lines += [line] if text is None else [indent + part for part in composed(text).splitlines()]
    return "\n".join(lines)
