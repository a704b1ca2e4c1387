"""SASS of compiled kernels as text. nvdisasm takes half a second to start, so it is started once for many kernels."""

import functools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import triton

_CODE = re.compile(rb"\.text\.[^\0]+")
#: A line of a listing: address, and guard and instruction.
_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(\S.*?)\s*;", re.MULTILINE)

#: By cubin: (address, instruction) of each instruction. Addresses of all go on from those of another kernel.
_listings: dict[bytes, list[tuple[int, str]]] = {}


@functools.cache
def tool(name: str) -> str:
    """cuobjdump and nvdisasm come inside Triton's wheel."""
    (path,) = Path(triton.__file__).parent.rglob(f"bin/{name}")
    return str(path)


def _run(name: str, *flags: str, data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        return subprocess.run([tool(name), *flags, file.name], check=True, capture_output=True, text=True).stdout


@functools.cache
def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    text = _run("cuobjdump", "-res-usage", data=cubin)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    # Spilled values live on the stack (local memory), which these kernels use for nothing else.
    return registers, stack + local


def listing(cubin: bytes, capability: int) -> list[tuple[int, str]]:
    """Address and text of each instruction, in order. Branches name addresses too, of the same count."""
    disassemble([cubin], capability)
    return _listings[cubin]


def disassemble(cubins: Iterable[bytes], capability: int) -> None:
    """Makes the listings of kernels for ``sm_<capability>``, all at once."""
    codes = {cubin: _code(cubin) for cubin in cubins if cubin not in _listings}
    if not codes:
        return
    name = f"SM{capability}{'a' if capability >= 90 else ''}"
    # Without its analysis of the data flow it takes two thirds of the time.
    text = _run("nvdisasm", "-ndf", "--binary", name, data=b"".join(codes.values()))
    lines = iter([(int(address, 16), instruction) for address, instruction in _LINE.findall(text)])
    line, end = next(lines), 0
    for cubin, code in codes.items():
        end += len(code)
        own = _listings[cubin] = []
        while line is not None and line[0] < end:
            own.append(line)
            line = next(lines, None)


def _code(cubin: bytes) -> bytes:
    """The one section of code of an ELF file."""
    (start,), (count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3C)
    # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, and what is of no interest.
    sections = [struct.unpack_from("<IIQQQQ16x", cubin, start + 64 * i) for i in range(count)]
    texts = sections[names][4]
    (code,) = (section for section in sections if _CODE.match(cubin, texts + section[0]))
    return cubin[code[4] : code[4] + code[5]]
