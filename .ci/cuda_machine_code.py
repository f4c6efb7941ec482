"""What ptxas and cuobjdump say of compiled kernels: registers, memory, instructions and loops."""

import re
import subprocess
from collections import defaultdict
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
        """The instructions of each loop: what lies on a way from the target of a backward branch back to it.

        Blocks that the compiler has moved to the end jump back as well; no way leads to them from there.
        """
        place = {instruction.address: n for n, instruction in enumerate(self.instructions)}
        after: dict[int, list[int]] = {}
        before: dict[int, list[int]] = defaultdict(list)
        for n, i in enumerate(self.instructions):
            ways = []
            if i.target is not None and i.target in place:
                ways.append(place[i.target])
            ends = i.opcode.split(".")[0] in ENDS or (i.target is not None and i.opcode.startswith("BRA"))
            if (not ends or i.predicated or ".DIV" in i.opcode) and n + 1 < len(self.instructions):
                ways.append(n + 1)
            after[n] = ways
            for way in ways:
                before[way].append(n)
        loops = []
        for n, i in enumerate(self.instructions):
            if i.target is None or i.target >= i.address or i.target not in place:
                continue
            head = place[i.target]
            reached = _reach(head, after, stop=n) & _reach(n, before, stop=head)
            if n in reached and head in reached:
                loops.append([self.instructions[m] for m in sorted(reached)])
        return loops


def _reach(start: int, ways: dict[int, list[int]], stop: int) -> set[int]:
    seen, open_ends = {start}, [start]
    while open_ends:
        at = open_ends.pop()
        for way in ways.get(at, []) if at != stop else []:
            if way not in seen:
                seen.add(way)
                open_ends.append(way)
    return seen


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
    branches = opcode.split(".")[0] == "BRA"
    target = re.search(r"0x([0-9a-f]+)", operands) if branches else None
    return Instruction(int(address, 16), bool(predicate), opcode, int(target[1], 16) if target else None)


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
    return name.strip().replace("> >", ">>")
