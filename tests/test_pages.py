"""README.md and docs/: their code runs and prints what they say, their commands parse, their links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from triton_norm import __main__

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in
         (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: str
    language: str
    code: str
    #: What the page shows right behind it, a block without a language.
    output: str | None


def blocks() -> list[Block]:
    found = []
    for page, text in PAGES.items():
        fences = list(FENCE.finditer(text))
        for fence, after in zip(fences, [*fences[1:], None], strict=False):
            language, code = fence.groups()
            shown = after is not None and not after[1] and not text[fence.end() : after.start()].strip()
            if language:
                found.append(Block(page, language, code, after[2] if shown else None))
    return found


BLOCKS = blocks()
EXAMPLES = [block for block in BLOCKS if block.language == "python"]
#: The README's two, which .ci/run runs as they stand.
FOR_A_FRESH_MACHINE = "python3 -m venv .venv-"
COMMANDS = [
    pytest.param(line.split(" #")[0].strip(), id=line.split(" #")[0].strip())
    for block in BLOCKS
    if block.language == "sh"
    for line in block.code.splitlines()
    if not line.strip().startswith("#") and not line.startswith(FOR_A_FRESH_MACHINE)
]
LINKS = [
    (page, target)
    for page, text in PAGES.items()
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
    if not target.startswith("https://")
]


def test_every_block_is_code_that_runs_or_what_code_before_it_prints():
    fences = [(page, language) for page, text in PAGES.items() for language, _ in FENCE.findall(text)]
    assert {language for _, language in fences} <= {"", "python", "sh"}
    outputs = sum(not language for _, language in fences)
    assert outputs == sum(block.output is not None for block in EXAMPLES) == 4
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("block", [pytest.param(block, id=f"{block.page} {i}") for i, block in enumerate(EXAMPLES)])
def test_examples_run(block, monkeypatch, capsys):
    """As on a machine without a GPU. What the backend leaves is compiled by nobody, which takes no minute."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch.manual_seed(0)
    exec(block.code.replace('"triton_norm")', '"triton_norm", options={"rest": "eager"})'), {"__name__": "example"})
    if block.output is not None:
        assert capsys.readouterr().out == block.output


def test_quick_start_is_short():
    code = EXAMPLES[0].code
    assert EXAMPLES[0].page == "README.md"
    assert code.count("\n") <= 10
    assert ".backward()" in code


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    """Of this package and of bench; nothing is run."""
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"], command
    module, arguments = words[2], words[3:]
    parser = __main__.build_parser() if module == "triton_norm" else importlib.import_module(module).parser()
    parser.parse_args(arguments)


@pytest.mark.parametrize("page, target", LINKS, ids=lambda part: part)
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    found = (ROOT / page).parent / path if path else ROOT / page
    assert found.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_page_is_linked_from_the_readme():
    linked = {target for page, target in LINKS if page == "README.md"}
    assert {page for page in PAGES if page != "README.md"} <= linked


def test_commands_named_in_text_exist():
    """``python -m bench.x`` and ``bench.x`` anywhere on the pages."""
    named = {name for text in PAGES.values() for name in re.findall(r"\bbench\.(\w+)", text)}
    assert named
    assert {name for name in named if not (ROOT / "bench" / f"{name}.py").exists()} == set()
