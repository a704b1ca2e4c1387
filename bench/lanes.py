"""A warp's registers and predicates, and how an instruction's operands are read and set.

A value is an int where all lanes agree, an array of 32 where they may not, and None where it is unknown; words are held
as unsigned.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sass import Instruction

LANES = 32
M32, M64, SIGN = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x80000000
Value = int | np.ndarray | None


def following(register: str, by: int) -> str:
    """The register ``by`` behind one: wide values fill several."""
    if register in ("RZ", "URZ"):
        return register
    kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()
    return f"{kind}{int(number) + by}"


class State:
    """Registers, predicates and constants of a warp; ``active`` are the lanes that are at the current instruction."""

    def __init__(self, constants: dict[int, int], program: tuple[int, int, int], warp: int) -> None:
        self.everyone = self.active = (1 << LANES) - 1
        self.constants = constants
        self.values: dict[str, Value] = {"RZ": 0, "URZ": 0, "SRZ": 0}
        self.predicates: dict[str, Value] = {"PT": 1, "UPT": 1}
        lane = np.arange(LANES, dtype=np.uint64)
        x, y, z = program
        self.special: dict[str, Value] = {
            "SR_TID.X": lane + np.uint64(32 * warp), "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": lane, "SR_CTAID.X": x,
            "SR_CTAID.Y": y, "SR_CTAID.Z": z, "SR_CgaCtaId": 0, "SRZ": 0,
        }  # fmt: skip

    def get(self, register: str) -> Value:
        return self.values.get(register)

    def mask(self, lanes: int) -> np.ndarray:
        return (np.uint64(lanes) >> np.arange(LANES, dtype=np.uint64)) & np.uint64(1) != 0

    def _merged(self, old: Value, new: Value, lanes: int | None) -> Value:
        """The new value in those lanes."""
        if lanes == self.everyone:
            return new
        if lanes == 0:
            return old
        if old is None or new is None or lanes is None:
            return None
        return np.where(self.mask(lanes), np.uint64(new), np.uint64(old))

    def put(self, register: str, value: Value, lanes: int | None) -> None:
        if register not in ("RZ", "URZ"):
            old = self.values.get(register) if lanes != self.everyone else None
            self.values[register] = self._merged(old, value, lanes)

    def put_predicate(self, name: str, value: Value, lanes: int | None) -> None:
        if name not in ("PT", "UPT"):
            old = self.predicates.get(name) if lanes != self.everyone else None
            self.predicates[name] = self._merged(old, value, lanes)

    def predicate(self, name: str) -> Value:
        """0 or 1."""
        value = self.predicates.get(name.lstrip("!"))
        return value if value is None or name[0] != "!" else value ^ 1

    def lanes(self, guard: str) -> int | None:
        """Those for which a guard holds, as bits."""
        value = self.predicate(guard)
        if value is None:
            return None
        if isinstance(value, int):
            return self.everyone if value else 0
        return int((value << np.arange(LANES, dtype=np.uint64)).sum())


def reader(word: str) -> Callable[[State], Value]:
    """Of an operand, as an unsigned word; ``-`` and ``~`` before a register are the instruction's business."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", word):
        number = int(word, 0) & M32
        return lambda state: number
    word = word.strip("-~|")
    if re.fullmatch(r"U?R(\d+|Z)", word):
        return lambda state: state.values.get(word)
    if constant := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", word):
        offset = int(constant[1], 16)
        return lambda state: state.constants.get(offset)
    return lambda state: state.special.get(word)


class Parts:
    """An instruction's operands: registers it sets, predicates it sets, sources, and predicates it reads."""

    def __init__(self, instruction: "Instruction", first_is_predicate: bool = False) -> None:
        words = list(instruction.operands)
        self.target = None if first_is_predicate else words.pop(0)
        if self.target is not None and re.fullmatch(r"U?P(\d|T)", self.target):
            # Of LOP3 and others whose first target is a predicate.
            self.sets = [self.target]
            self.target = words.pop(0)
        else:
            self.sets = []
        while words and re.fullmatch(r"U?P(\d|T)", words[0]):
            self.sets.append(words.pop(0))
        self.sources = [word for word in words if not re.fullmatch(r"!?U?P(\d|T)", word)]
        self.reads = [word for word in words if re.fullmatch(r"!?U?P(\d|T)", word)]
        self.read = [reader(word) for word in self.sources]
        self.negative = [word.startswith("-") and not word[1].isdigit() for word in self.sources]
        self.inverted = [word.startswith("~") for word in self.sources]

    def high(self, i: int) -> Callable[[State], Value]:
        """The upper word of a wide source."""
        word = self.sources[i].strip("-~|")
        if re.fullmatch(r"U?R\d+", word):
            return reader(following(word, 1))
        if constant := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", word):
            return reader(f"c[0x0][{hex(int(constant[1], 16) + 4)}]")
        return lambda state: 0


def pure(instruction: "Instruction", parts: Parts, compute: Callable, wide: bool = False) -> Callable:
    """``compute`` takes the sources, then the predicates that are read; it gives the result and those that are set."""

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        values = [read(state) for read in parts.read]
        values += [state.predicate(name) for name in parts.reads]
        results = (None,) * (1 + len(parts.sets)) if any(v is None for v in values) else compute(*values)
        value, *flags = results if isinstance(results, tuple) else (results,)
        if parts.target is not None:
            if wide:
                state.put(parts.target, None if value is None else value & M32, lanes)
                state.put(following(parts.target, 1), None if value is None else value >> 32, lanes)
            else:
                state.put(parts.target, value, lanes)
        for name, value in zip(parts.sets, [*flags, None, None], strict=False):
            state.put_predicate(name, value, lanes)

    return execute


def flag(condition) -> Value:
    return condition.astype(np.uint64) if isinstance(condition, np.ndarray) else int(condition)


def choose(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, np.ndarray):
        return np.where(condition != 0, np.asarray(a, np.uint64), np.asarray(b, np.uint64))
    return a if condition else b


def extended(a: Value) -> Value:
    """Sign-extended to 64 bits."""
    return a | choose(flag(a >= SIGN), M64 ^ M32, 0)


def minus(a: Value) -> Value:
    return ((a ^ M32) + 1) & M32


def signed(parts: Parts, i: int) -> Callable[[Value], Value]:
    if parts.negative[i]:
        return minus
    return (lambda a: a ^ M32) if parts.inverted[i] else (lambda a: a)


#: Set no register.
_SILENT = (
    "ST", "STG", "STS", "STL", "STSM", "RED", "BAR", "BRA", "EXIT", "NOP", "WARPSYNC", "BSSY", "BSYNC", "MEMBAR",
    "CCTL", "DEPBAR", "ERRBAR",
)  # fmt: skip


def forget(instruction: "Instruction") -> Callable:
    """What it sets becomes unknown: predicates, if they come first, and a register with those behind that it fills."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in _SILENT:
        return lambda state, lanes: None
    double = name[0] == "D" or "64" in modifiers or "F64" in modifiers
    words = {"LDG": instruction.bits // 32, "LDS": instruction.bits // 32, "LDSM": 4}.get(name, 2 if double else 1)
    predicates, target = [], None
    for word in instruction.operands:
        if re.fullmatch(r"U?P(\d|T)", word):
            predicates.append(word)
            continue
        target = word if re.fullmatch(r"U?R\d+", word) else None
        break
    targets = [following(target, i) for i in range(max(words, 1))] if target else []

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        for word in targets:
            state.put(word, None, lanes)
        for word in predicates:
            state.put_predicate(word, None, lanes)

    return execute
