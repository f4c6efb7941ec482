"""What ptxas and cuobjdump say of compiled kernels: registers, memory, instructions and loops."""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

LOCAL_ACCESSES = ("LDL", "STL")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
ENDS = ("EXIT", "RET", "BRX", "KILL", "RTT")


@dataclass
class Usage:
    """Of one instantiation on one architecture, as ptxas reports it; bytes."""

    registers: int = 0
    static: int = 0
    stack: int = 0
    spilled: int = 0


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str
    target: int | None  # of a branch
    conditional: bool  # or returns: a call, or a branch on an operand as in BRA P1, 0x40

    def is_a(self, wanted: str) -> bool:
        """LDG.128 is any LDG with 128 among its modifiers; HMMA any HMMA; A|B either of them."""
        own, *own_modifiers = self.opcode.split(".")
        for way in wanted.split("|"):
            name, *modifiers = way.split(".")
            if own == name and set(modifiers) <= set(own_modifiers):
                return True
        return False


@dataclass
class Function:
    """One instantiation in one cubin."""

    mangled: str
    threads: int = 0  # most a block may have, from __launch_bounds__
    usage: Usage = field(default_factory=Usage)
    instructions: list[Instruction] = field(default_factory=list)

    def holds(self, wanted: str) -> bool:
        return any(i.is_a(wanted) for i in self.instructions)

    def loop_holds(self, wanted: tuple[str, ...]) -> bool:
        return any(all(any(i.is_a(w) for i in loop) for w in wanted) for loop in self.loops())

    def loops(self) -> list[list[Instruction]]:
        """The instructions of each outermost loop: those from which a way leads back to themselves.

        Where branches stand says little: a loop may be laid out in any order, and blocks that the compiler has moved
        to the end jump back as well, to where nothing leads to them again.
        """
        after = self._ways()
        before: list[list[int]] = [[] for _ in after]
        for n, ways in enumerate(after):
            for way in ways:
                before[way].append(n)
        # Kosaraju: strongly connected parts, found backwards in the order in which the forward search leaves them.
        left: list[int] = []
        seen: set[int] = set()
        for n in range(len(after)):
            left += _search(n, after, seen)
        found, seen = [], set()
        for n in reversed(left):
            part = sorted(_search(n, before, seen))
            if len(part) > 1 or (part and part[0] in after[part[0]]):
                found.append([self.instructions[m] for m in part])
        return found

    def _ways(self) -> list[list[int]]:
        """Which instructions, by number, may follow each."""
        place = {instruction.address: n for n, instruction in enumerate(self.instructions)}
        ways = []
        for n, i in enumerate(self.instructions):
            ends = i.opcode.split(".")[0] in ENDS or (i.target is not None and not i.conditional)
            following = [] if ends and not i.predicated else [n + 1][: len(self.instructions) - n - 1]
            ways.append(following + ([place[i.target]] if i.target in place else []))
        return ways


def _search(start: int, ways: list[list[int]], seen: set[int]) -> list[int]:
    """What is reached from `start` and not in `seen`, to which it is added, in the order of leaving."""
    if start in seen:
        return []
    seen.add(start)
    left, path = [], [(start, iter(ways[start]))]
    while path:
        at, open_ways = path[-1]
        way = next((w for w in open_ways if w not in seen), None)
        if way is None:
            left.append(at)
            path.pop()
        else:
            seen.add(way)
            path.append((way, iter(ways[way])))
    return left


def usage_of(log: str) -> dict[str, Usage]:
    """From what `ptxas -v` prints: usage by mangled name, in its order of lines."""
    usages: dict[str, Usage] = {}
    current = Usage()
    for line in log.splitlines():
        if name := re.search(r"Compiling entry function '(\w+)'", line):
            current = usages.setdefault(name[1], Usage())
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", line):
            current.registers, current.static = int(used[1]), int(used[2] or 0)
    return usages


def read_cubin(cubin: Path, log: str, cuobjdump: Path) -> list[Function]:
    """Every kernel of a cubin."""
    functions = {name: Function(name, usage=usage) for name, usage in usage_of(log).items()}
    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"\n\s+Function : ", sass)[1:]:
        name, _, code = part.partition("\n")
        functions[name].instructions = [_instruction(*found) for found in INSTRUCTION.findall(code)]
    elf = subprocess.run([cuobjdump, "-elf", cubin], capture_output=True, text=True, check=True).stdout
    for section in re.split(r"\n\.nv\.info\.", elf)[1:]:
        name = section.partition("\n")[0].strip()
        body = section.partition("\n\n")[0]
        threads = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+((?:0x\w+ ?)+)", body)
        if name in functions and threads:
            x, y, z = (int(value, 16) for value in threads[1].split()[:3])
            functions[name].threads = x * y * z
    return list(functions.values())


def _instruction(address: str, predicate: str, opcode: str, operands: str) -> Instruction:
    branches = opcode.split(".")[0] in ("BRA", "CALL")
    target = re.search(r"0x([0-9a-f]+)\s*$", operands) if branches else None
    # A call returns to what follows it; where ptxas means it as a jump, it is predicated.
    falls_through = re.match(r"CALL|BRA.*\.(DIV|CONV)", opcode) or re.match(r"\s*!?U?[PR]", operands)
    conditional = branches and bool(falls_through)
    return Instruction(int(address, 16), bool(predicate), opcode, int(target[1], 16) if target else None, conditional)


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled names, as the marks know them."""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {mangled: shortened(name) for mangled, name in zip(names, out.splitlines(), strict=True)}


def shortened(name: str) -> str:
    """Without namespaces and parameters: `relu_pool_kernel<ForwardMask<float, unsigned int>>`."""
    name = re.sub(r"\(anonymous namespace\)::|\bdlfast::(\w+::)*|^void ", "", name)
    depth = 0
    for n, letter in enumerate(name):
        if letter == "(" and depth == 0:  # opens the parameters; template arguments have parentheses too
            name = name[:n]
            break
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return re.sub(r">\s+(?=>)", ">", name.strip())
