"""The integer instructions of SASS, for the 32 lanes of a warp at once; others make their results unknown."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .lanes import (
    M32,
    M64,
    SIGN,
    Parts,
    State,
    Value,
    choose,
    extended,
    flag,
    following,
    forget,
    minus,
    pure,
    reader,
    signed,
)

if TYPE_CHECKING:
    from .sass import Instruction


def compile(instruction: "Instruction") -> Callable[[State, int | None], None]:
    """A function that executes the instruction in some lanes; None stands for lanes that are unknown."""
    name = instruction.name
    if name[0] == "U" and name[1:] in _TABLE:
        name = name[1:]
    make = _TABLE.get(name)
    made = make and make(instruction)
    return made or forget(instruction)


def _iadd3(instruction: "Instruction") -> Callable:
    parts, carries = Parts(instruction), "X" in instruction.modifiers

    def compute(*values: Value):
        total: Value = 0
        for value, negative, inverted in zip(values, parts.negative, parts.inverted, strict=False):
            # -a counts as ~a + 1, so that its carry is that of the adder; with a carry coming in, it is ~a.
            total = total + ((value ^ M32) + (not carries) if negative else value ^ M32 if inverted else value)
        for carry in values[len(parts.sources) :]:
            total = total + carry
        return total & M32, flag(total >> 32 >= 1), flag(total >> 32 >= 2)

    return pure(instruction, parts, compute)


def _viadd(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    a_sign, b_sign = signed(parts, 0), signed(parts, 1)
    return pure(instruction, parts, lambda a, b, *_: (a_sign(a) + b_sign(b)) & M32)


def _least(instruction: "Instruction", parts: Parts, a: Value, b: Value, least: Value) -> Value:
    flip = 0 if "U32" in instruction.modifiers else SIGN
    smaller = flag((a ^ flip) < (b ^ flip))
    return choose(smaller ^ least ^ 1, a, b)


def _vimnmx(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    signs = [signed(parts, i) for i in range(len(parts.sources))]

    def compute(*values: Value):
        *numbers, least = values
        result, *others = (sign(v) for sign, v in zip(signs, numbers, strict=False))
        for other in others:
            result = _least(instruction, parts, result, other, least)
        return result

    return pure(instruction, parts, compute) if len(parts.reads) == 1 else None


def _viaddmnmx(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    signs = [signed(parts, i) for i in range(3)]

    def compute(a: Value, b: Value, c: Value, least: Value):
        return _least(instruction, parts, (signs[0](a) + signs[1](b)) & M32, signs[2](c), least)

    return pure(instruction, parts, compute) if len(parts.reads) == 1 else None


def _iabs(instruction: "Instruction") -> Callable:
    return pure(instruction, Parts(instruction), lambda a: choose(flag(a >= SIGN), minus(a), a))


def _imad(instruction: "Instruction") -> Callable:
    parts, modifiers = Parts(instruction), instruction.modifiers
    unsigned, wide, high = "U32" in modifiers, "WIDE" in modifiers, "HI" in modifiers
    if wide or high:
        upper = parts.high(2)
        # The addend is as wide as the product.
        parts.read.append(upper)
    signs = [signed(parts, i) for i in range(3)]

    def compute(a: Value, b: Value, c: Value, *rest: Value):
        a, b = signs[0](a), signs[1](b)
        if not (wide or high):
            total = a * b + signs[2](c)
            for carry in rest:
                total = total + carry
            return total & M32
        addend = c | (rest[0] << 32)
        if parts.negative[2]:
            addend = (M64 ^ addend) + 1
        product = a * b if unsigned else extended(a) * extended(b)
        total = (product & M64) + addend
        for carry in rest[1:]:
            total = total + carry
        if isinstance(total, int):
            carried = total >> 64
            total &= M64
        else:
            carried = flag(total < addend)
        return total >> 32 if high else total, flag(carried)

    return pure(instruction, parts, compute, wide)


def _lea(instruction: "Instruction") -> Callable:
    parts, modifiers = Parts(instruction), instruction.modifiers
    high = "HI" in modifiers
    sign_a, sign_b = signed(parts, 0), signed(parts, 1)
    extends = "SX32" in modifiers

    def compute(a: Value, b: Value, *rest: Value):
        if high and not extends:
            c, shift, *carries = rest
            a = a | (c << 32)
        else:
            shift, *carries = rest
            a = extended(sign_a(a)) if extends else sign_a(a)
        shifted = (a << shift) & M64
        total = (shifted >> 32 if high else shifted & M32) + sign_b(b)
        for carry in carries:
            total = total + carry
        return total & M32, flag(total >> 32 != 0)

    return pure(instruction, parts, compute)


def _lut(table: int, a: Value, b: Value, c: Value) -> Value:
    result: Value = 0
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i >> bit & 1 else v ^ M32 for v, bit in ((a, 2), (b, 1), (c, 0)))
            result = result | (x & y & z)
    return result


def _lop3(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    signs = [signed(parts, i) for i in range(3)]

    def compute(a: Value, b: Value, c: Value, table: int, *_: Value):
        value = _lut(table, signs[0](a), signs[1](b), signs[2](c))
        return value, flag(value != 0)

    return pure(instruction, parts, compute) if len(parts.sources) == 4 else None


def _plop3(instruction: "Instruction") -> Callable:
    first, second, *_ = instruction.operands
    *reads, table, other = instruction.operands[2:]
    tables = int(table, 16), int(other, 16)

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        values = [state.predicate(word) for word in reads]
        for name, table in zip((first, second), tables, strict=True):
            # Unknown predicates may not matter.
            known = _known_lut(table, values)
            state.put_predicate(name, known, lanes)

    return execute


def _known_lut(table: int, values: list[Value]) -> Value:
    for i, value in enumerate(values):
        if value is None:
            either = [_known_lut(table, [*values[:i], n, *values[i + 1 :]]) for n in (0, 1)]
            same = isinstance(either[0], int) and isinstance(either[1], int) and either[0] == either[1]
            return either[0] if same else None
    return _lut(table, *values) & 1


def _shf(instruction: "Instruction") -> Callable | None:
    parts, modifiers = Parts(instruction), instruction.modifiers
    left, high, arithmetic = "L" in modifiers, "HI" in modifiers, "S32" in modifiers or "S64" in modifiers
    wide = "U64" in modifiers or "S64" in modifiers
    most = 63 if wide else 32

    def compute(low: Value, shift: Value, upper: Value):
        shift = choose(flag(shift > most), most, shift) if "W" not in modifiers else shift & (63 if wide else 31)
        both = low | (upper << 32)
        if left:
            return ((both << shift) & M64) >> 32 if high else (both << shift) & M32
        shifted = both >> shift
        if arithmetic:
            # The bits that come in at the top.
            fill = choose(flag(upper >= SIGN), M64, 0)
            shifted = shifted | (fill ^ (fill >> shift))
        return (shifted >> 32 if high else shifted) & M32

    return pure(instruction, parts, compute)


def _sgxt(instruction: "Instruction") -> Callable:
    unsigned = "U32" in instruction.modifiers

    def compute(a: Value, width: int):
        low = a & ((1 << width) - 1)
        negative = flag((low >> max(width - 1, 0)) & 1 != 0)
        return low if unsigned else low | choose(negative, M32 ^ ((1 << width) - 1), 0)

    return pure(instruction, Parts(instruction), lambda a, w: compute(a, w) if isinstance(w, int) else None)


def _sel(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    a_sign, b_sign = signed(parts, 0), signed(parts, 1)
    return pure(instruction, parts, lambda a, b, p: choose(p, a_sign(a), b_sign(b)))


def _prmt(instruction: "Instruction") -> Callable | None:
    if instruction.modifiers:
        return None

    def compute(a: Value, selector: Value, b: Value):
        if not isinstance(selector, int):
            return None
        both, result = a | (b << 32), 0
        for i in range(4):
            pick = selector >> (4 * i) & 0xF
            byte = both >> (8 * (pick & 7)) & 0xFF
            if pick & 8:
                byte = (byte >> 7) * 0xFF
            result = result | (byte << (8 * i))
        return result

    return pure(instruction, Parts(instruction), compute)


_COMPARE = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip
_COMBINE = {"AND": lambda a, b: a & b, "OR": lambda a, b: a | b, "XOR": lambda a, b: a ^ b}


def _isetp(instruction: "Instruction") -> Callable:
    first, second, a, b, *reads = instruction.operands
    modifiers = [m for m in instruction.modifiers if m != "U32"]
    comparison, boolean = _COMPARE[modifiers[0]], _COMBINE[modifiers[1]]
    extended = "EX" in modifiers
    flip = 0 if "U32" in instruction.modifiers or modifiers[0] in ("EQ", "NE") else SIGN
    read_a, read_b = reader(a), reader(b)

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        x, y = read_a(state), read_b(state)
        outer = state.predicate(reads[0])
        result: Value = None
        if x is not None and y is not None:
            x, y = x ^ flip, y ^ flip
            result = flag(comparison(x, y))
            if extended:
                lower = state.predicate(reads[1])
                if lower is None:
                    result = None
                elif modifiers[0] == "EQ":
                    result = result & lower
                elif modifiers[0] == "NE":
                    result = result | lower
                else:
                    result = choose(flag(x == y), lower, result)
        state.put_predicate(first, _combined(boolean, modifiers[1], result, outer), lanes)
        if second not in ("PT", "UPT"):
            opposite = None if result is None else result ^ 1
            state.put_predicate(second, _combined(boolean, modifiers[1], opposite, outer), lanes)

    return execute


def _combined(boolean: Callable, name: str, a: Value, b: Value) -> Value:
    """Of which one may be unknown and not matter."""
    if a is None or b is None:
        known = b if a is None else a
        settled = {"AND": 0, "OR": 1}.get(name)
        return settled if isinstance(known, int) and known == settled else None
    return boolean(a, b)


def _mov(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    return pure(instruction, parts, lambda a, *_: minus(a) if parts.negative[0] else a)


def _ldc(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    words = max(instruction.bits // 32, 1)
    found = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", parts.sources[0])
    if not found or instruction.bits < 32:
        return None
    offset = int(found[1], 16)

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        for i in range(words):
            state.put(following(parts.target, i), state.constants.get(offset + 4 * i), lanes)

    return execute


def _cs2r(instruction: "Instruction") -> Callable:
    parts = Parts(instruction)
    words = 1 if "32" in instruction.modifiers else 2
    zero = parts.sources == ["SRZ"]

    def execute(state: State, lanes: int | None) -> None:
        lanes = None if lanes is None else lanes & state.active
        for i in range(words):
            state.put(following(parts.target, i), 0 if zero else None, lanes)

    return execute


def _hfma2(instruction: "Instruction") -> Callable | None:
    """Only as the move of a constant, two half-precision numbers, that it often is."""
    target, a, b, *constant = instruction.operands
    if (a.lstrip("-"), b) != ("RZ", "RZ") or len(constant) != 2:
        return None
    try:
        high, low = (int(np.float16(float(word)).view(np.uint16)) for word in constant)
    except ValueError:
        return None

    def execute(state: State, lanes: int | None) -> None:
        state.put(target, (high << 16) | low, None if lanes is None else lanes & state.active)

    return execute


def _floats(function: Callable) -> Callable:
    """Of a word, in every lane: the steps of a division by a number that is not known at compile time."""

    def compute(a: Value) -> Value:
        if isinstance(a, int):
            return function(a)
        return np.array([function(int(n)) for n in a], dtype=np.uint64)

    return lambda instruction: pure(instruction, Parts(instruction), compute)


def _bits(number: float) -> int:
    return int(np.float32(number).view(np.uint32))


def _number(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _to_float(instruction: "Instruction") -> Callable | None:
    negative = "S32" in instruction.modifiers or not any(m.startswith("U") for m in instruction.modifiers)
    up = "RP" in instruction.modifiers
    if any(m in instruction.modifiers for m in ("F64", "S64", "U64", "F16", "U8", "S8", "U16", "S16")):
        return None

    def convert(n: int) -> int:
        n = n - (1 << 32) if negative and n >= SIGN else n
        result = np.float32(n)
        if up and float(result) < n:
            result = np.nextafter(result, np.float32(np.inf))
        return _bits(result)

    return _floats(convert)(instruction)


def _to_int(instruction: "Instruction") -> Callable | None:
    if not {"U32", "TRUNC"} <= set(instruction.modifiers):
        return None
    return _floats(lambda n: min(max(int(_number(n)), 0), M32))(instruction)


def _mufu(instruction: "Instruction") -> Callable | None:
    if instruction.modifiers != ("RCP",):
        return None

    def reciprocal(bits: int) -> int:
        number = _number(bits)
        return _bits(np.float32(1 / number) if number and number == number else np.inf)

    return _floats(reciprocal)(instruction)


def _p2r(instruction: "Instruction") -> Callable | None:
    target, kind, old, mask = instruction.operands
    if instruction.modifiers or kind not in ("PR", "UPR"):
        return None
    prefix, chosen, read = ("UP" if kind[0] == "U" else "P"), int(mask, 16), reader(old)

    def execute(state: State, lanes: int | None) -> None:
        value = read(state)
        for i in range(7):
            if chosen >> i & 1:
                bit = state.predicates.get(f"{prefix}{i}")
                value = None if bit is None or value is None else (value & (M32 ^ (1 << i))) | (bit << i)
        state.put(target, value, None if lanes is None else lanes & state.active)

    return execute


def _r2p(instruction: "Instruction") -> Callable | None:
    _, source, mask = instruction.operands
    read, chosen = reader(source), int(mask, 16)

    def execute(state: State, lanes: int | None) -> None:
        value = None if instruction.modifiers else read(state)
        for i in range(7):
            if chosen >> i & 1:
                bit = None if value is None else value >> i & 1
                state.put_predicate(f"P{i}", bit, None if lanes is None else lanes & state.active)

    return execute


def _r2ur(instruction: "Instruction") -> Callable:
    def first(a: Value, *_: Value) -> Value:
        return a if isinstance(a, int) else int(a[0])

    return pure(instruction, Parts(instruction), first)


_TABLE: dict[str, Callable] = {
    "IADD3": _iadd3, "VIADD": _viadd, "IADD": _viadd, "VIMNMX": _vimnmx, "IMNMX": _vimnmx, "VIMNMX3": _vimnmx,
    "VIADDMNMX": _viaddmnmx, "IABS": _iabs, "IMAD": _imad, "LEA": _lea, "LOP3": _lop3, "PLOP3": _plop3, "SHF": _shf,
    "SGXT": _sgxt, "SEL": _sel, "PRMT": _prmt, "ISETP": _isetp, "MOV": _mov, "LDC": _ldc, "CS2R": _cs2r,
    "S2R": _mov, "S2UR": _mov, "HFMA2": _hfma2, "I2F": _to_float, "I2FP": _to_float, "F2I": _to_int, "MUFU": _mufu,
    "P2R": _p2r, "R2P": _r2p, "R2UR": _r2ur,
}  # fmt: skip
