"""Reading a compiled program's text: what it communicates, and what it writes to memory."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"(\w+)=(?:%([\w.-]+)|\{((?:%[\w.-]+(?:, )?)+)\})")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_VIEWS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion" or "all-reduce-start".
      shape: its result, as the text has it.
      operands: their names.
      called: the computations it runs, and how often each at a time.
      root: whether it is its computation's result.
      origin: the scopes and the primitive it comes from, such as "jit(decode_step)/layer_0/mlp/dot_general", or "".
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[tuple[str, int], ...]
    root: bool
    origin: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: the instructions of each computation by name, and the one that runs first."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def runs(self) -> collections.Counter:
        """How often each computation runs in one execution.

        Loops count with their trip count where XLA states it and once where it depends on data; of a conditional
        every branch counts.
        """
        runs = collections.Counter({self.entry: 1})
        # XLA prints a computation before those that call it.
        for name in reversed(self.computations):
            for instruction in self.computations[name].values():
                for callee, times in instruction.called:
                    runs[callee] += runs[name] * times
        return runs

    def written(self) -> Iterator[tuple[str, str]]:
        """What is written to memory, array by array: (operation, shape), a fusion under the operation at its root.

        The inside of a fusion stays in registers and is left out, as are views of other buffers.
        """
        fused = set()
        for instructions in self.computations.values():
            fused |= {name for i in instructions.values() if i.opcode == "fusion" for name, _ in i.called}
        for name, instructions in self.computations.items():
            if self.runs[name] and name not in fused:
                for instruction in instructions.values():
                    if instruction.opcode == "fusion":
                        yield from self._roots(instruction.called[0][0])
                    elif instruction.opcode not in _VIEWS:
                        yield instruction.opcode, instruction.shape

    def _roots(self, fusion: str) -> Iterator[tuple[str, str]]:
        inside = self.computations[fusion]
        root = next(i for i in inside.values() if i.root)
        for result in [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]:
            made = result
            while made.opcode == "bitcast":
                made = inside[made.operands[0]]
            if made.opcode == "fusion":
                yield from self._roots(made.called[0][0])
            else:
                yield made.opcode, result.shape


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind that a program runs.

    Attributes:
      kind: one of `COLLECTIVES`.
      count: how many run in one execution; one that combines several arrays counts once.
      bytes: of their operands on one device, over one execution.
    """

    kind: str
    count: int
    bytes: int


def parse(text: str) -> Program:
    """The program whose optimized HLO, `compiled.as_text()`, this is.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if not line.startswith((" ", "\t")):
            found = _COMPUTATION.match(line)
            current = {} if found else None
            if found:
                computations[found[2]] = current
                entry = found[2] if found[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, shape, opcode, rest = found.groups()
            operands, _, attributes = rest.partition(")")
            current[name] = Instruction(
                name=name,
                opcode=opcode,
                shape=shape,
                operands=tuple(_NAME.findall(operands)),
                called=tuple(_calls(opcode, attributes)),
                root=line.lstrip().startswith("ROOT "),
                origin=origin[1] if (origin := _ORIGIN.search(attributes)) else "",
            )
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation; pass compiled.as_text()")
    return Program(computations, entry)


def _calls(opcode: str, attributes: str) -> Iterator[tuple[str, int]]:
    trips = _TRIPS.search(attributes)
    for attribute, one, several in _CALLED.findall(attributes):
        if attribute != "predecessors":  # control-predecessors are instructions
            for name in [one] if one else _NAME.findall(several):
                yield name, int(trips[1]) if trips and opcode == "while" else 1


def collectives(program: Program) -> list[Collective]:
    """What a program communicates, by kind, in alphabetical order of the kinds."""
    counts, sizes = collections.Counter(), collections.Counter()
    for name, instructions in program.computations.items():
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")  # of an asynchronous pair the start counts, not the end
            if kind in COLLECTIVES:
                operands = sum(num_bytes(instructions[operand].shape) for operand in instruction.operands)
                counts[kind] += program.runs[name]
                sizes[kind] += program.runs[name] * operands
    return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts) if counts[kind]]


def num_elements(shape: str) -> int:
    """Elements of an array, or of all arrays of a tuple, such as "(bf16[16,4096]{1,0}, s32[])"."""
    return sum(elements for _, elements in _arrays(shape))


def num_bytes(shape: str) -> int:
    """Bytes of the same."""
    return sum(math.ceil(bits * elements / 8) for bits, elements in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[int, int]]:
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)  # a token has none
        yield bits, math.prod(int(size) for size in dims.split(",") if size)
