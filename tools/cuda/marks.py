"""The marks beside each kernel in csrc/**/*.cu: what its machine code may use and what it must hold.

A mark is a comment directly above a `__global__` function (above its `template` line, where it has one):

    // inspect: registers 64
    // inspect for Staged: dynamic 49152, holds LDG.128
    // inspect from sm_80 for Tile<.*__half: registers 128, loop HMMA LDSM LDGSTS

`for` takes a regular expression, searched for in the instantiation's name without dlfast:: and anonymous
namespaces, and `from` the first architecture; of several marks that fit, the last one's numbers hold, and the
instructions of all. The items:

    registers N    at most N registers a thread
    static N       at most N bytes of static shared memory (0 if no mark says so)
    dynamic N      the table reckons with N bytes of dynamic shared memory, which only the launch decides (else 0)
    holds A B      each of these instructions is there; A.128 asks for the modifier as well, A|B for either
    loop A B       and all of these in one loop
"""

import re
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"//\s*inspect(?: from sm_(?P<arch>\d+))?(?: for (?P<pattern>.+?))?: (?P<items>.+)")
NUMBERS = ("registers", "static", "dynamic")
INSTRUCTIONS = ("holds", "loop")


class MarkError(Exception):
    """A mark that cannot be read, or a kernel without one."""


@dataclass(frozen=True)
class Mark:
    pattern: str
    first_arch: int
    numbers: dict[str, int]
    instructions: dict[str, tuple[str, ...]]

    def fits(self, instantiation: str, arch: int) -> bool:
        return arch >= self.first_arch and re.search(self.pattern, instantiation) is not None


@dataclass(frozen=True)
class Budget:
    """What one instantiation may use on one architecture, and must hold."""

    registers: int
    static: int
    dynamic: int
    holds: tuple[str, ...]
    loop: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """A `__global__` function and its marks."""

    name: str
    place: str
    marks: tuple[Mark, ...]

    def budget(self, instantiation: str, arch: int) -> Budget:
        fitting = [mark for mark in self.marks if mark.fits(instantiation, arch)]
        numbers = {"static": 0, "dynamic": 0}
        for mark in fitting:
            numbers.update(mark.numbers)
        if "registers" not in numbers:
            raise MarkError(f"{self.place}: no mark gives the registers of {instantiation} for sm_{arch}")
        holds, loop = (tuple(op for m in fitting for op in m.instructions.get(key, ())) for key in INSTRUCTIONS)
        return Budget(numbers["registers"], numbers["static"], numbers["dynamic"], holds, loop)


def parse_mark(line: str, place: str) -> Mark:
    match = MARK.fullmatch(line.strip())
    if match is None:
        raise MarkError(f"{place}: not a mark: {line.strip()}")
    numbers: dict[str, int] = {}
    instructions: dict[str, tuple[str, ...]] = {}
    for item in match["items"].split(","):
        key, *values = item.split()
        if key in NUMBERS and len(values) == 1 and values[0].isdigit():
            numbers[key] = int(values[0])
        elif key in INSTRUCTIONS and values:
            instructions[key] = tuple(values)
        else:
            raise MarkError(f"{place}: not an item of a mark: {item.strip()}")
    try:
        re.compile(match["pattern"] or "")
    except re.error as error:
        raise MarkError(f"{place}: {match['pattern']} is no regular expression: {error}") from None
    return Mark(match["pattern"] or "", int(match["arch"] or 0), numbers, instructions)


def kernels_of(source: Path, root: Path) -> list[Kernel]:
    """Every `__global__` function of a file, each with at least one mark."""
    lines = source.read_text().splitlines()
    kernels: list[Kernel] = []
    used: set[int] = set()
    for number, line in enumerate(lines):
        if re.match(r"\s*(//|\*)", line) or "__global__" not in line:
            continue
        place = f"{source.relative_to(root)}:{number + 1}"
        # The name is what stands before the parameters; attributes have parentheses of their own.
        declared = re.sub(r"__\w+__\s*(\((?:[^()]|\([^()]*\))*\))?", " ", " ".join(lines[number : number + 4]))
        name = re.search(r"(\w+)\s*\(", declared)
        if name is None:
            raise MarkError(f"{place}: no name found after __global__")
        first = number
        while first > 0 and not re.match(r"\s*//", lines[first - 1]) and lines[first - 1].strip():
            first -= 1  # up over the template line
        marks: list[Mark] = []
        while first > 0 and re.match(r"\s*//", lines[first - 1]):
            first -= 1
            if re.match(r"\s*//\s*inspect\b", lines[first]):
                marks.insert(0, parse_mark(lines[first], f"{source.relative_to(root)}:{first + 1}"))
                used.add(first)
        if not marks:
            raise MarkError(f"{place}: kernel {name[1]} has no mark; tools/cuda/marks.py says what one is")
        kernels.append(Kernel(name[1], place, tuple(marks)))
    for number, line in enumerate(lines):
        if re.match(r"\s*//\s*inspect\b", line) and number not in used:
            raise MarkError(f"{source.relative_to(root)}:{number + 1}: this mark stands above no kernel")
    return kernels
