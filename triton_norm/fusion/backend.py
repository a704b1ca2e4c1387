"""``torch.compile(model, backend="triton_norm")``: norms and what follows them fused in the captured graph.

Dynamo's graph is of whatever Python code it can capture: functions and modules, optional arguments, control flow. The
norms in it that something follows become this package's; what is left is compiled by another backend.
"""

import collections
import weakref
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .chains import replace
from .finder import Chain, Finder
from .meaning import described, followed, innermost
from .report import FuseReport

__all__ = ["backend", "report_of"]

#: Backends that the rest of a graph may go to.
_RESTS = ("inductor", "eager", "aot_eager")


def backend(
    graph: fx.GraphModule, inputs: list[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """A backend of ``torch.compile``: every (sum +) norm (* scale + shift) (+ residual) (+ activation) (+ padding) in
    one pass.

    The sum ahead is that of ``norm(x + f(x))``, for layer and RMS norms; what reads it besides gets it from the same
    pass. An RMS norm that is written out in elementary operations is one too, and is multiplied with its weight before
    it is rounded to half.

    ``options={"rest": name}`` says who compiles what is left: "inductor" (the default), "aot_eager", or "eager", which
    runs it as it is. ``mode`` and all other options are Inductor's. Raises ``ValueError`` for another ``rest``, or for
    options that it does not take.

        step = torch.compile(model, backend="triton_norm")
        y = step(x)
        print(tn.fuse_report(step))
    """
    options = dict(options or {})
    rest = options.pop("rest", "inductor")
    if rest not in _RESTS:
        raise ValueError(f"unknown rest {rest!r}: expected one of {', '.join(map(repr, _RESTS))}")
    if rest != "inductor" and (options or mode):
        raise ValueError(f"mode and options {sorted(options)} are Inductor's: the rest goes to {rest!r}")
    _remember(inputs, _fuse(graph))
    if rest != "inductor":
        return torch._dynamo.lookup_backend(rest)(graph, inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **options}
    return compile_fx(graph, inputs, config_patches=patches or None)


class _Entry(NamedTuple):
    """A norm in a captured graph, and what became of it."""

    #: The id and the path of the module that called it, and its function unless it is that module's only one.
    module: int | None
    path: str
    function: str
    #: What is in its pass, empty if it is alone; what follows it otherwise; what stayed behind it.
    fused: str
    alone: str
    stayed: str
    operations: int


class _Captured(NamedTuple):
    """A graph: its norms, and the parameters by which its model is known."""

    entries: list[_Entry]
    parameters: list[weakref.ref]


_captured: collections.deque[_Captured] = collections.deque(maxlen=1000)


def _fuse(graph: fx.GraphModule) -> list[_Entry]:
    """Fuses in the graph, and in those that it checkpoints."""
    entries = []
    for name, part in list(graph.named_modules()):
        if isinstance(part, fx.GraphModule) and (part is graph or name.startswith("wrap_body")):
            # Modules are calls where the compiler is told not to look into them.
            modules = dict(part.named_modules())
            chains = Finder(part.graph, modules).find(lambda _: "the compiler calls its module")
            entries += [_entry(chain, modules) for chain in reversed(chains)]
            replace(part.graph, [chain for chain in chains if chain.is_fused])
            part.graph.lint()
            part.recompile()
    return entries


def _entry(chain: Chain, modules: dict[str, nn.Module]) -> _Entry:
    norm, count = chain.norm, len(chain.operations)
    module, path, cls = innermost(norm.node)
    name = norm.name or described(norm.node, modules)
    function = "" if cls is not None and name == cls.__name__ else norm.name or norm.node.name
    return _Entry(
        module, path, function,
        chain.words(modules) if chain.is_fused else "",
        f"{norm.words(modules)}, {followed(norm.result, modules)}",
        "" if chain.stayed is None else f"{described(chain.stayed[0], modules)}: {chain.stayed[1]}",
        count + (chain.stayed is not None),
    )  # fmt: skip


def _remember(inputs: list[Any], entries: list[_Entry]) -> None:
    parameters = [weakref.ref(p) for p in inputs if isinstance(p, nn.Parameter)]
    _captured.append(_Captured(entries, parameters))
    for captured in [c for c in _captured if any(p() is None for p in c.parameters)]:
        _captured.remove(captured)


def report_of(model: nn.Module) -> FuseReport:
    """What became of the model's norms in the graphs that were captured so far."""
    paths = {id(m): path for path, m in model.named_modules()}
    own = {id(p) for p in model.parameters()}
    report = FuseReport(compiled=True)
    counts: dict[str, int] = {}
    captured = False
    for entries, parameters in list(_captured):
        known = {id(p()) for p in parameters}
        if not (known & own if known else any(entry.module in paths for entry in entries)):
            continue
        captured = True
        seen: collections.Counter[str] = collections.Counter()
        for entry in entries:
            path = paths.get(entry.module, entry.path)
            path = ".".join(filter(None, (path, entry.function)))
            seen[path] += 1
            path += f" ({seen[path]})" if seen[path] > 1 else ""
            for kind in ("fused", "alone", "stayed"):
                getattr(report, kind).pop(path, None)
            kind = "fused" if entry.fused else "alone"
            getattr(report, kind)[path] = getattr(entry, kind)
            if entry.stayed:
                report.stayed[path] = entry.stayed
            counts[path] = entry.operations
    report.operations = sum(counts.values())
    if not captured:
        report.left[""] = "nothing was captured yet: call the compiled model first"
    return report
