"""A kernel's SASS as its warps run it: every instruction that is issued, how often, and on which pipe.

Branches depend on integers: sizes, program and thread numbers, and what divisions and comparisons make of them. ``run``
executes these for one warp, with the launch's own arguments, and follows the branches; floating point and loaded values
are unknown, and so is what is computed from them. Thus loops run as often as they do on a GPU, whatever the compiler
unrolled. The two sides of a branch that lanes take differently are both issued. A branch that depends on an unknown
value counts as not taken, in ``Run.guesses``, unless one side is the rare path of a division or root, a call.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import disassembly, integers
from .lanes import LANES, State, Value, following

#: Offsets in constant bank 0 of sm_90: the grid's sizes, and where a kernel's parameters start.
GRID, PARAMETERS = 0xC, 0x210
#: A run that issues so many instructions has lost its way.
MOST = 3_000_000

_BY_PIPE = {
    "alu": (
        "IADD3", "LOP3", "SHF", "ISETP", "FSETP", "FMNMX", "SEL", "FSEL", "PRMT", "LEA", "VIADD", "IMNMX", "VIMNMX",
        "VIMNMX3", "VIADDMNMX", "PLOP3", "F2FP", "IABS", "FSET", "HSETP2", "HMNMX2", "P2R", "R2P", "BMSK", "SGXT",
        "VOTE", "IADD", "MOV", "CS2R", "I2FP", "FMNMX3", "REDUX",
    ),
    "fma": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"),
    "imad": ("IMAD", "IDP", "DADD", "DMUL", "DFMA", "DSETP"),
    "mufu": ("MUFU", "I2F", "F2I", "F2F", "I2I", "FRND", "FLO", "POPC"),
    "lsu": (
        "LDG", "STG", "LDS", "STS", "SHFL", "LDL", "STL", "LDSM", "STSM", "LDGSTS", "ATOM", "ATOMS", "ATOMG", "RED",
        "LD", "ST", "MOVM",
    ),
}  # fmt: skip
_PIPES = {name: pipe for pipe, names in _BY_PIPE.items() for name in names}
_GLOBAL_READS, _GLOBAL_WRITES = ("LDG", "LD", "ATOM", "ATOMG", "RED"), ("STG", "ST", "ATOM", "ATOMG", "RED")


@dataclass(frozen=True)
class Instruction:
    """``@guard name.modifiers operands``."""

    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    #: Where a branch or call goes, as an index of the code.
    target: int | None = None

    @functools.cached_property
    def pipe(self) -> str:
        """Empty for what only takes an issue slot: branches, barriers, and the uniform datapath."""
        return _PIPES.get(self.name, "")

    @functools.cached_property
    def bits(self) -> int:
        """Width of a memory access."""
        sizes = [int(m.lstrip("US")) for m in self.modifiers if re.fullmatch(r"[US]?(8|16|64|128)", m)]
        return sizes[0] if sizes else 32

    @functools.cached_property
    def registers(self) -> frozenset[str]:
        """All that the instruction names; of wider operands the first."""
        return frozenset(re.findall(r"\bR\d+", " ".join(self.operands)))

    @functools.cached_property
    def loaded(self) -> tuple[str, ...]:
        """The registers that a load from memory fills."""
        if self.name not in ("LDG", "LD"):
            return ()
        first = next(word for word in self.operands if re.match(r"R\d", word) or word == "RZ")
        return tuple(following(first, i) for i in range(max(self.bits // 32, 1)))


@dataclass
class Code:
    instructions: list[Instruction]
    #: Addresses by which calls return.
    addresses: dict[int, int]


@functools.cache
def disassemble(cubin: bytes, capability: int) -> Code:
    lines = disassembly.listing(cubin, capability)
    at = {address: index for index, (address, _) in enumerate(lines)}
    instructions = []
    for _, text in lines:
        guard, name, rest = re.match(r"(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*)", text).groups()
        base, *modifiers = name.split(".")
        goes = re.search(r"\b0x[0-9a-f]+$", rest) if base in ("BRA", "CALL", "JMP") else None
        target = at.get(int(goes[0], 16)) if goes else None
        operands = tuple(word.replace(".reuse", "") for word in re.split(r",\s*", rest) if word)
        instructions.append(Instruction(guard or "PT", base, tuple(modifiers), operands, target))
    first = lines[0][0]
    return Code(instructions, {address - first: index for address, index in at.items()})


@dataclass
class Run:
    """What one warp issued, summed over runs by ``add``; each figure is per warp and may be a mean."""

    #: Warp instructions by pipe; "issue" is all of them. In "lsu" an access counts 4 bytes a lane, so a wide one more.
    pipes: Counter = field(default_factory=Counter)
    #: The same by name, for those who look closer.
    names: Counter = field(default_factory=Counter)
    #: Bytes that active lanes loaded from and stored to global memory.
    loaded: float = 0.0
    stored: float = 0.0
    #: How often the warp had to wait for memory, and the most bytes that it had under way when it did.
    trips: float = 0.0
    batch: float = 0.0
    guesses: float = 0.0
    #: Which of the pointers were read and written through.
    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)

    def add(self, other: "Run", weight: float) -> None:
        for counts, more in ((self.pipes, other.pipes), (self.names, other.names)):
            for key, count in more.items():
                counts[key] += count * weight
        for name in ("loaded", "stored", "trips", "guesses"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * weight)
        self.batch = max(self.batch, other.batch)
        self.read |= other.read
        self.written |= other.written


#: Fake addresses of tensors: number i starts at (i + 1) << POINTER.
POINTER = 44


def run(code: Code, constants: dict[int, int], program: tuple[int, int, int], warp: int) -> Run:
    """One warp of one program; ``constants`` are the 32-bit words of constant bank 0 by their offset."""
    state = State(constants, program, warp)
    result, compiled = Run(), _compiled(code)
    issued, idle = [0] * len(compiled), [0] * len(compiled)
    groups: dict[int, int] = {0: state.everyone}
    pending: set[str] = set()
    steps, before = 0, 0.0
    while groups:
        # Whoever is behind goes first: so lanes that went different ways meet again.
        at = min(groups)
        state.active = groups.pop(at)
        instruction, execute = compiled[at]
        issued[at] += 1
        steps += 1
        if steps > MOST:
            raise RuntimeError(f"a warp that issues {MOST} instructions: are branches misread?")
        if pending and not pending.isdisjoint(instruction.registers):
            pending.clear()
            result.trips += 1
            result.batch, before = max(result.batch, result.loaded - before), result.loaded
        taking = state.lanes(instruction.guard)
        name = instruction.name
        if taking is not None and not taking & state.active and name not in _CONTROL:
            # No lane does it, which takes an issue slot and no pipe.
            idle[at] += 1
            groups[at + 1] = groups.get(at + 1, 0) | state.active
            continue
        if name in _CONTROL:
            goes, stays = _branch(code, at, instruction, state, taking, result)
        else:
            goes, stays = {}, state.active
            if instruction.pipe == "lsu":
                lanes = (state.active if taking is None else taking & state.active).bit_count()
                _access(instruction, state, lanes, result)
                pending.update(instruction.loaded)
            execute(state, taking)
        for to, lanes in (*goes.items(), *(((at + 1, stays),) if stays else ())):
            groups[to] = groups.get(to, 0) | lanes
    for (instruction, _), count, without in zip(compiled, issued, idle, strict=True):
        result.pipes["issue"] += count
        if done := count - without:
            result.names[instruction.name] += done
            if instruction.pipe:
                wide = max(instruction.bits // 32, 1) if instruction.pipe == "lsu" else 1
                result.pipes[instruction.pipe] += done * wide
    return result


def _compiled(code: Code) -> list[tuple[Instruction, Callable]]:
    if not hasattr(code, "_compiled"):
        code._compiled = [(one, integers.compile(one)) for one in code.instructions]
    return code._compiled


_CONTROL = ("BRA", "JMP", "CALL", "RET", "EXIT", "BRX", "JMX")


def _branch(
    code: Code, at: int, instruction: Instruction, state: State, taking: int | None, result: Run
) -> tuple[dict[int, int], int]:
    """Which lanes go where, and which go on."""
    name, active = instruction.name, state.active
    if name == "BRA" and "DIV" in instruction.modifiers:
        # Taken by warps whose lanes have parted for good, which these never do.
        return {}, active
    # Further conditions stand before the target.
    for word in instruction.operands:
        if re.fullmatch(r"!?U?P(\d|T)", word):
            more = state.lanes(word)
            taking = None if taking is None or more is None else taking & more
    if taking is None:
        # Going on is to issue what the branch would skip.
        taking = active if name != "EXIT" and _rare(code, at + 1) else 0
        result.guesses += not (taking or _rare(code, instruction.target))
    taking &= active
    if name == "EXIT":
        return {}, active & ~taking
    if not taking:
        return {}, active
    target = instruction.target
    if name == "RET":
        address = state.get(instruction.operands[0].split()[0])
        first = address if isinstance(address, int) else None if address is None else int(address[0])
        target = code.addresses.get(first)
    if target is None:
        raise RuntimeError(f"{name} to nowhere that is known: {' '.join(instruction.operands)}")
    return {target: taking}, active & ~taking


def _rare(code: Code, at: int | None) -> bool:
    """Whether a call comes before the code branches again."""
    while at is not None and at < len(code.instructions):
        name = code.instructions[at].name
        if name == "CALL":
            return True
        if name in _CONTROL:
            return False
        at += 1
    return False


def _access(instruction: Instruction, state: State, lanes: int, result: Run) -> None:
    name = instruction.name
    if name not in _GLOBAL_READS and name not in _GLOBAL_WRITES:
        return
    moved = lanes * instruction.bits // 8
    place = next(word for word in instruction.operands if "[" in word)
    pointer = _pointer(state, place)
    if name in _GLOBAL_READS:
        result.loaded += moved
        result.read.add(pointer)
    if name in _GLOBAL_WRITES:
        result.stored += moved
        result.written.add(pointer)


def _pointer(state: State, place: str) -> int:
    """Which tensor ``desc[UR8][R6.64+0x10]`` is in, -1 where that is unknown."""
    inside = re.findall(r"\[([^\[\]]*)\]", place)[-1]
    address: Value = 0
    for word in re.findall(r"-?\w[\w.]*", inside):
        if word.startswith(("R", "UR")):
            base, *wide = word.split(".")
            low = state.get(base)
            high = state.get(following(base, 1)) if "64" in wide or base.startswith("UR") else 0
            if low is None or high is None or address is None:
                return -1
            address = address + low + (high << 32)
        else:
            address = address + int(word, 16) if not word.startswith("-") else address
    if isinstance(address, np.ndarray):
        active = [(state.active >> lane) & 1 for lane in range(LANES)]
        address = int(address[active.index(1)])
    return (address >> POINTER) - 1
