"""What a forward asks about its arguments' types and shapes: answered one way in a trace, asked again at the call."""

import builtins
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Node

#: Ranks that are tried where a forward asks for the number of dims as a Python number.
RANKS = (4, 3, 1, 0)
#: Combinations of answers that are followed.
_MOST = 8
_SYMBOLS = {
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.mod: "%",
}  # fmt: skip
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda")
_METHODS = ("size", "dim")
#: Those that ask about proxies for their own ends.
_TRACERS = ("torch.fx", "torch.overrides", "torch._C", "torch.utils._pytree", __package__)


class Decisions:
    """The answers in one trace: those that are given, and the first one of every other question.

    ``asked`` maps a question, a Python expression of the arguments, to its answer and the answers that were not taken.
    """

    def __init__(self, given: tuple[Any, ...] = ()) -> None:
        self.given = given
        self.asked: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        #: Arguments that were taken for tensors.
        self.tensors: set[str] = set()

    def answer(self, question: str, answers: tuple[Any, ...]) -> Any:
        if question not in self.asked:
            place = len(self.asked)
            answer = self.given[place] if place < len(self.given) else answers[0]
            self.asked[question] = answer, tuple(a for a in answers if a != answer)
        return self.asked[question][0]

    @contextmanager
    def as_tensors(self, arguments: type) -> Iterator[None]:
        """Has ``isinstance`` answer that what is of the class ``arguments`` is a tensor, and notes who was asked about.

        Not by a ``__class__`` of theirs, which torch's compiled functions would believe as well.
        """
        real = builtins.isinstance

        def answer(what: object, classes: Any) -> bool:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if type(what) is not arguments or caller.startswith(_TRACERS):
                return real(what, classes)
            self.tensors.add(what.node.target)
            return issubclass(arguments, classes) or issubclass(torch.Tensor, classes)

        builtins.isinstance = answer
        try:
            yield
        finally:
            builtins.isinstance = real

    def forget(self) -> None:
        """The questions; what is given stays."""
        self.asked.clear()
        self.tensors.clear()

    def guards(self) -> tuple[str, ...]:
        """Expressions that are all true where the answers are right."""
        types = [f"isinstance({name}, Tensor)" for name in sorted(self.tensors)]
        return (*types, *(_guard(question, answer) for question, (answer, _) in self.asked.items()))

    def others(self) -> Iterator[tuple[Any, ...]]:
        """What to give to traces that answer otherwise from some place on."""
        answers = [answer for answer, _ in self.asked.values()]
        for place, (_, others) in enumerate(self.asked.values()):
            if place >= len(self.given):
                yield from ((*answers[:place], other) for other in others)


def _guard(question: str, answer: Any) -> str:
    if isinstance(answer, bool):
        return f"({question})" if answer else f"not ({question})"
    return f"{question} == {answer}"


def follow(trace: Callable[[Decisions], Any]) -> Iterator[tuple[Decisions, Any]]:
    """Traces with one combination of answers after the other; those that cannot be traced raise in ``trace``."""
    pending: list[tuple[Any, ...]] = [()]
    for _ in range(_MOST):
        if not pending:
            break
        decisions = Decisions(pending.pop(0))
        yield decisions, trace(decisions)
        pending += decisions.others()


def question(node: Node) -> tuple[str, set[str]] | None:
    """The node as an expression of the arguments' types and shapes alone, and of which arguments."""
    names: set[str] = set()
    words = _words(node, names)
    return None if words is None else (words, names)


def _words(value: Any, names: set[str]) -> str | None:
    if not isinstance(value, Node):
        return repr(value) if isinstance(value, (bool, int, float, str, torch.dtype, type(None))) else None
    if value.op == "placeholder":
        return None
    if value.kwargs:
        return None
    of = value.args[0]
    is_argument = isinstance(of, Node) and of.op == "placeholder"
    if value.op == "call_method":
        if not is_argument or value.target not in _METHODS or not all(isinstance(a, int) for a in value.args[1:]):
            return None
        names.add(of.target)
        return f"{of.target}.{value.target}({', '.join(map(str, value.args[1:]))})"
    if value.op != "call_function":
        return None
    if value.target is getattr:
        name = value.args[1]
        if is_argument and name in _ATTRIBUTES:
            names.add(of.target)
            return f"{of.target}.{name}"
        within = _words(of, names) if name in ("type", "index") else None
        return None if within is None else f"{within}.{name}"
    parts = [_words(part, names) for part in value.args]
    if None in parts or len(parts) != 2:
        return None
    if value.target is operator.getitem:
        return f"{parts[0]}[{parts[1]}]"
    symbol = _SYMBOLS.get(value.target)
    return None if symbol is None else f"({parts[0]} {symbol} {parts[1]})"
