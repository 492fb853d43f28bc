"""Reads the PTX of a kernel along its control flow, for faults that show as wrong numbers alone, and rarely.

Both are looked for on every path that the branches allow:

- `in_flight`: registers of a wgmma that are touched before the wait for it. Accumulators may be neither read nor
  written, register operands not written (PTX ISA, "wgmma.mma_async"). A plain copy of an accumulator is let pass, and
  is as much in flight: LLVM renames registers so, and ptxas removes such copies or says that it serializes wgmma.
- `unfenced`: copies by TMA to shared memory after ordinary accesses, without a proxy fence between (PTX ISA, "Async
  proxy"). What another warpgroup accessed counts too, once it has arrived at an mbarrier and the copying one has waited
  at one. To be safe, all of shared memory is taken for one buffer, and all mbarriers for one.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

Groups = tuple[frozenset[str], ...]
"""Registers that wgmma works on: of each committed group, the oldest first, and of what is not committed."""

_STATEMENT = re.compile(r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<brace>[{}])|(?P<text>[^;]*);)")
_INSTRUCTION = re.compile(r"(?P<guard>@!?\S+\s+)?(?P<opcode>[\w.:]+)\s*(?P<operands>.*)", re.DOTALL)
_WGMMA = re.compile(r"\{(?P<accumulators>[^}]*)\},\s*(?P<operand>\{[^}]*\})?")
_COPY = re.compile(r"%\w+, (?P<source>%\w+)")
_FENCE = re.compile(r"fence\.proxy\.async(\.shared::\w+)?")
_TMA_LOAD = re.compile(r"cp\.async\.bulk\..*::\w+\.global\b.*")
_NOT_SHARED = (".global", ".param", ".local", ".const")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a kernel's body; `successors` are the numbers of those that may run next."""

    opcode: str
    operands: str
    guarded: bool
    successors: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}"

    @property
    def written(self) -> frozenset[str]:
        """Registers of the first operand, unless it is an address."""
        return _registers(re.match(r"\{[^}]*\}|[^,\[]*", self.operands)[0])


def hazards(ptx: str) -> list[str]:
    """The instructions of a kernel at which either fault shows, each with what is wrong."""
    program = parse(ptx)
    return [*in_flight(program), *unfenced(program)]


def parse(ptx: str) -> list[Instruction]:
    """The body of the first kernel.

    Raises:
      ValueError: it branches in a way that is not followed here.
    """
    body = re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", ptx[ptx.index("{", ptx.index(".entry")) :], flags=re.MULTILINE)
    lines, labels, scopes, opened, at = [], {}, (), 0, 0
    while statement := _STATEMENT.match(body, at):
        at = statement.end()
        if statement["brace"] == "{":
            opened += 1
            scopes = (*scopes, opened)
        elif statement["brace"]:
            scopes = scopes[:-1]
            if not scopes:
                break
        elif statement["label"]:
            labels[scopes[-1], statement["label"]] = len(lines)
        elif not statement["text"].startswith("."):  # a declaration
            lines.append((_INSTRUCTION.match(statement["text"]), scopes))
    return [_linked(i, line, scopes, labels) for i, (line, scopes) in enumerate(lines)]


def _linked(i: int, line: re.Match, scopes: tuple[int, ...], labels: dict[tuple[int, str], int]) -> Instruction:
    opcode, operands, guarded = line["opcode"], " ".join(line["operands"].split()), line["guard"] is not None
    kind = opcode.split(".")[0]
    if kind in ("brx", "call"):
        raise ValueError(f"{opcode} {operands}: control flow of this kind is not followed")
    successors = (i + 1,) if guarded or kind not in ("bra", "ret", "exit", "trap") else ()
    if kind == "bra":
        successors += (next(labels[scope, operands] for scope in reversed(scopes) if (scope, operands) in labels),)
    return Instruction(opcode, operands, guarded, successors)


def flow(program: list[Instruction], start: Any, step: Callable, join: Callable) -> dict[int, Any]:
    """The state before each instruction that can be reached, where `step(state, instruction)` is the one after it.

    `join(a, b)` is the state where two paths meet, which holds all that either does.
    """
    before, work = {0: start}, [0]
    while work:
        i = work.pop()
        after = step(before[i], program[i])
        for successor in program[i].successors:
            state = join(before[successor], after) if successor in before else after
            if successor not in before or state != before[successor]:
                before[successor] = state
                work.append(successor)
    return before


# --- registers of a wgmma in flight ---


def in_flight(program: list[Instruction]) -> list[str]:
    hazards = []
    for role in ("accumulators", "operand"):
        before = flow(program, (frozenset(),), lambda groups, line, role=role: _issue(groups, line, role), _join)
        for i, groups in sorted(before.items()):
            touched = _touched(program[i], role) & frozenset().union(*groups)
            if touched and not (role == "accumulators" and _renamed(program[i], groups)):
                hazards.append(f"{', '.join(sorted(touched))}: {role} of a wgmma in flight, in {program[i]}")
    return hazards


def _registers(operands: str) -> frozenset[str]:
    return frozenset(re.findall(r"%\w+", operands))


def _of_wgmma(line: Instruction, role: str) -> frozenset[str]:
    return _registers(_WGMMA.match(line.operands)[role] or "")


def _touched(line: Instruction, role: str) -> frozenset[str]:
    """What an instruction does that must not be done to registers of that role: operands may be read."""
    if role == "operand":
        return line.written
    if line.opcode.startswith("wgmma.mma_async"):  # which adds to accumulators in its turn
        return _of_wgmma(line, "operand")
    return _registers(line.operands)


def _renamed(line: Instruction, groups: Groups) -> str | None:
    """The register in flight that an instruction copies to another."""
    copy = _COPY.fullmatch(line.operands) if line.opcode.startswith("mov.") else None
    return copy["source"] if copy and any(copy["source"] in group for group in groups) else None


def _issue(groups: Groups, line: Instruction, role: str) -> Groups:
    if line.opcode.startswith("wgmma.mma_async"):
        return *groups[:-1], groups[-1] | _of_wgmma(line, role)
    if line.opcode.startswith("wgmma.commit_group"):
        return _trimmed((*groups, frozenset()))
    if line.opcode.startswith("wgmma.wait_group"):
        return groups[-1 - int(line.operands) :]
    if role == "accumulators" and (source := _renamed(line, groups)):
        return tuple(group | line.written if source in group else group for group in groups)
    return groups


def _trimmed(groups: Groups) -> Groups:
    """Without empty groups at the old end, and no more of them than 8, which a loop that never waits would exceed."""
    while len(groups) > 1 and not groups[0]:
        groups = groups[1:]
    return groups if len(groups) <= 8 else (groups[0] | groups[1], *groups[2:])


def _join(a: Groups, b: Groups) -> Groups:
    a, b = ((frozenset(),) * (len(other) - len(one)) + one for one, other in ((a, b), (b, a)))
    return tuple(x | y for x, y in zip(a, b, strict=True))


# --- copies to shared memory without a fence ---


def unfenced(program: list[Instruction]) -> list[str]:
    before = flow(program, False, _accessed, bool.__or__)
    if any(before.get(i) and line.opcode.startswith("mbarrier.arrive.") for i, line in enumerate(program)):
        before = flow(program, False, _accessed_by_any, bool.__or__)
    return [
        f"no proxy fence between ordinary accesses and {line}"
        for i, line in enumerate(program)
        if before.get(i) and _TMA_LOAD.fullmatch(line.opcode)
    ]


def _accessed(before: bool, line: Instruction) -> bool:
    """Whether ordinary loads and stores have touched shared memory since the last proxy fence."""
    if _FENCE.fullmatch(line.opcode) and not line.guarded:
        return False
    kind = line.opcode.split(".")[0]
    shared = kind in ("ld", "st", "ldmatrix", "stmatrix") and not any(space in line.opcode for space in _NOT_SHARED)
    return before or shared


def _accessed_by_any(before: bool, line: Instruction) -> bool:
    return _accessed(before, line) or line.opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait"))
