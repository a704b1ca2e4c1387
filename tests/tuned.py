"""What tests of the tuner share: a process that has tuned nothing, and a GPU that kernels are measured for."""

from pathlib import Path

from triton_norm.tuning import autotune, table

#: What the interpreter is called where it stands for a GPU.
TARGET = "Test GPU sm_00, triton 0.0"


def forget() -> None:
    """What a new process knows."""
    autotune._state = autotune._State()
    autotune._warned.clear()
    autotune.forget()


def file() -> Path:
    return autotune.path()


def on_disk() -> dict[str, table.Entry]:
    return table.read(file()).get(TARGET, {})
