"""The path of a warp through a kernel: basic blocks, loops, and the choice of a branch where the case decides it.

Branch conditions are not computed. Loops are found from dominators and run as often as the case says, by what they
contain; other branches are chosen by what their arms contain. See `Choice`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from bench.sass_model.sass import Instruction

_PHILOX = re.compile(r"0xd2511f53|-0x2daee0ad|0xcd9e8d57|-0x326172a9")  # its two multipliers, also as signed numbers
_TANH = re.compile(r"\b1\.59576|0x3fcc422a")  # 2 sqrt(2 / π), of the tanh form of GELU
_MEMORY = ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP", "ATOM", "RED")
_HALF = "HADD2.F32", "F2FP.F16"
_LONGEST = 5_000_000  # instructions of a path; a longer one never ends
_MASK = 16  # comparisons of a basic block, from which on it masks scores


@dataclass(frozen=True)
class Choice:
    """Which path a case takes.

    Attributes:
        trips: By kind of loop ("matmul", "TMA" for loads by TMA, "memory", "other"; "outer matmul" for the loop around
            such a loop, "outer outer matmul" for the next one), how often it runs. Loops of a kind that is missing run
            once.
        take: Features whose arm of a branch is taken if only one arm has them: "matmul", "dropout" (Philox), "TMA",
            "memory" (any access to global memory), "load" and "store", "mask" (many comparisons), "tanh",
            "half" (conversions from or to fp16).
        avoid: Features whose arm is not taken if only one arm has them, or only one cannot avoid them.
        outside: The choice outside of loops with matmuls, such as a last iteration after one, if it differs.
        never: Features whose arm is not taken either, even if it has features to take, unless a loop in it runs.
    """

    trips: Mapping[str, int] = field(default_factory=dict)
    take: frozenset[str] = frozenset()
    avoid: frozenset[str] = frozenset()
    outside: Choice | None = None
    never: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Block:
    """A basic block: instructions from `start` to before `end`, and the blocks that can follow, the next one first."""

    start: int
    end: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, all its blocks, and what it contains."""

    header: int
    body: frozenset[int]
    kind: str


class ControlFlow:
    """The control flow of one kernel.

    Args:
        instructions: All of its instructions, from the entry on.
    """

    def __init__(self, instructions: Sequence[Instruction]):
        self.instructions = instructions
        self.blocks = _basic_blocks(instructions)
        self.dominators = _dominators([block.successors for block in self.blocks], 0)

    @cached_property
    def loops(self) -> list[Loop]:
        """The natural loops, smaller ones first."""
        bodies: dict[int, set[int]] = {}
        for tail, block in enumerate(self.blocks):
            for header in block.successors:
                if self.dominators[tail] >> header & 1 and self._reachable >> tail & 1:
                    bodies.setdefault(header, {header}).update(self._leading_to(tail, header))
        found: list[Loop] = []
        for header, body in sorted(bodies.items(), key=lambda item: (len(item[1]), item[0])):
            kind = self._kind(body)
            nested = [loop.kind for loop in found if loop.header in body and loop.kind.endswith(kind)]
            found.append(Loop(header, frozenset(body), f"outer {nested[-1]}" if nested else kind))
        return found

    @cached_property
    def _reachable(self) -> int:
        return _bits(_reach(0, [block.successors for block in self.blocks], ()))

    @cached_property
    def _joins(self) -> list[int | None]:
        """For each block the nearest one that every path from it passes, its immediate post-dominator."""
        end = len(self.blocks)  # a virtual exit
        before: list[list[int]] = [[] for _ in range(end + 1)]
        for index, block in enumerate(self.blocks):
            for successor in block.successors or (end,):
                before[successor].append(index)
        after = _dominators(before, end)
        joins: list[int | None] = []
        for index in range(end):
            others = [other for other in range(end + 1) if after[index] >> other & 1 and other != index]
            nearest = max(others, key=lambda other: after[other].bit_count(), default=end)
            joins.append(None if nearest == end else nearest)
        return joins

    def _leading_to(self, tail: int, header: int) -> set[int]:
        """Return the blocks from which `tail` can be reached without passing `header`."""
        if tail == header:
            return {header}
        before: list[list[int]] = [[] for _ in self.blocks]
        for index, block in enumerate(self.blocks):
            for successor in block.successors:
                before[successor].append(index)
        return {block for block in _reach(tail, before, (header,)) if self._reachable >> block & 1}

    def _code(self, blocks: set[int]) -> list[Instruction]:
        return [
            line
            for index in sorted(blocks)
            for line in self.instructions[self.blocks[index].start : self.blocks[index].end]
        ]

    def _kind(self, blocks: set[int]) -> str:
        found = self._features(blocks)
        return next((kind for kind in ("matmul", "TMA", "memory") if kind in found), "other")

    @cached_property
    def _of_block(self) -> list[set[str]]:
        """The features of each block."""
        return [_features(self.instructions[block.start : block.end]) for block in self.blocks]

    def _features(self, blocks: set[int]) -> set[str]:
        return set[str]().union(*(self._of_block[index] for index in blocks))

    def path(self, choice: Choice) -> list[int]:
        """Return the indices of the instructions that a warp executes, in order.

        Raises:
            ValueError: The path does not end, so a loop's number of iterations is missing.
        """
        path: list[int] = []
        iterations: dict[int, int] = {}
        arms: dict[int, int] = {}  # the better arm of each branch, chosen once
        headers = {loop.header: loop for loop in self.loops}
        previous, current = -1, 0
        while True:
            if current in headers:
                inside = previous in headers[current].body
                iterations[current] = iterations.get(current, 0) + 1 if inside else 1
            block = self.blocks[current]
            path.extend(range(block.start, block.end))
            if len(path) > _LONGEST:
                raise ValueError(f"the path did not end within {_LONGEST} instructions: {choice}")
            if not block.successors:
                return path
            following = block.successors[0]
            if len(block.successors) > 1:
                following = self._decide(current, choice, iterations, arms)
            previous, current = current, following

    def _decide(self, current: int, choice: Choice, iterations: Mapping[int, int], arms: dict[int, int]) -> int:
        first, second = self.blocks[current].successors
        for loop in self.loops:
            if current in loop.body and (first in loop.body) != (second in loop.body):
                stay, leave = (first, second) if first in loop.body else (second, first)
                trips, count = choice.trips.get(loop.kind, 1), iterations[loop.header]
                return stay if (count < trips if self._ends_iteration(stay, loop) else count <= trips) else leave
        if current not in arms:
            inside = any(loop.kind == "matmul" and current in loop.body for loop in self.loops)
            arms[current] = self._better_arm(current, choice if inside else choice.outside or choice)
        return arms[current]

    def _ends_iteration(self, block: int, loop: Loop) -> bool:
        """Return whether `block` is the loop's header, or only jumps there."""
        if block == loop.header:
            return True
        only_jumps = self.blocks[block].end - self.blocks[block].start == 1
        return only_jumps and self.blocks[block].successors == (loop.header,)

    def _better_arm(self, current: int, choice: Choice) -> int:
        """Return the successor on the better path to where both join again."""
        first, second = self.blocks[current].successors
        join = self._joins[current]
        stops = [loop.header for loop in self.loops if current in loop.body]
        successors = [block.successors for block in self.blocks]
        arms = [
            set() if start in (join, *stops) else _reach(start, successors, (join, *stops)) for start in (first, second)
        ]
        only = [arms[0] - arms[1], arms[1] - arms[0]]
        scores = [self._score(blocks, choice) for blocks in only]
        if scores[0] == scores[1]:  # for instance because both arms lead to a mask, but one of them around it, too
            scores = [-self._cannot_avoid(start, choice.avoid, {join, *stops}) for start in (first, second)]
        if scores[0] != scores[1]:
            return first if scores[0] > scores[1] else second
        lengths = [len(self._code(blocks)) for blocks in only]
        longer = first if lengths[0] >= lengths[1] else second
        if join is None:  # one of them leaves the kernel, the shorter one early
            return longer
        return second if longer == first else first  # the longer one is an exception, for instance a wait

    def _cannot_avoid(self, start: int, features: frozenset[str], ends: set[int | None]) -> bool:
        """Return whether each path from `start` to one of `ends`, or out of the kernel, has one of these features."""
        marked = [index for index, found in enumerate(self._of_block) if found & features]
        if start in ends or not marked:
            return False
        if start in marked:
            return True
        around = _reach(start, [block.successors for block in self.blocks], (*ends, *marked))
        following = [self.blocks[index].successors for index in around]
        return all(after and ends.isdisjoint(after) for after in following)

    def _score(self, blocks: set[int], choice: Choice) -> int:
        """Return 1 if the case demands these blocks, -1 if it excludes them, and 0 if it says nothing."""
        matmuls = {index for index in blocks if "matmul" in self._of_block[index]}
        if matmuls and any(choice.trips.get(loop.kind) == 0 and matmuls <= loop.body for loop in self.loops):
            return -1  # a loop around matmuls that never runs
        trips = [choice.trips.get(loop.kind) for loop in self.loops if loop.header in blocks]
        found = self._features(blocks)
        if any(trips) or (found & choice.take and not found & choice.never):
            return 1
        return -1 if found & (choice.avoid | choice.never) or 0 in trips else 0


def _features(code: Sequence[Instruction]) -> set[str]:
    """Return the features of a basic block, see `Choice`."""
    names = [line.opcode.split(".")[0] for line in code]
    dropout = any(_PHILOX.search(line.operands) for line in code)
    tests = {
        "matmul": any(name.endswith("MMA") for name in names),
        "TMA": "UTMALDG" in names,
        "memory": any(name.startswith(_MEMORY) for name in names),
        "load": "LDG" in names,
        "store": "STG" in names,
        "dropout": dropout,
        "mask": names.count("ISETP") >= _MASK and not dropout,  # a random byte is compared, too
        "half": any(line.opcode.startswith(_HALF) for line in code),
        "tanh": any(_TANH.search(line.operands) for line in code),
    }
    return {name for name, holds in tests.items() if holds}


def _basic_blocks(instructions: Sequence[Instruction]) -> list[Block]:
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    starts = {0}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None and instruction.target in index_of:
            starts.add(index_of[instruction.target])
        if instruction.target is not None or _ends_path(instruction):
            starts.add(index + 1)
    bounds = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    number = {start: block for block, start in enumerate(bounds[:-1])}
    blocks = []
    for start, end in pairwise(bounds):
        last = instructions[end - 1]
        following = [] if _ends_path(last) or end == len(instructions) else [number[end]]
        if last.target in index_of and not last.opcode.startswith("BRA.DIV"):  # warps do not diverge here
            following.append(number[index_of[last.target]])
        blocks.append(Block(start, end, tuple(dict.fromkeys(following))))
    return blocks


def _ends_path(instruction: Instruction) -> bool:
    """Return whether the next instruction never follows. A conditional exit is that of a program without work."""
    return instruction.always_leaves or (
        instruction.opcode.startswith(("RET", "BRX", "JMX")) and not instruction.predicate
    )


def _dominators(successors: Sequence[Sequence[int]], entry: int) -> list[int]:
    """Return for each node the set of its dominators, as bits; all nodes for one that cannot be reached."""
    everything = (1 << len(successors)) - 1
    found = [everything] * len(successors)
    found[entry] = 1 << entry
    before: list[list[int]] = [[] for _ in successors]
    for node, following in enumerate(successors):
        for successor in following:
            before[successor].append(node)
    changed = True
    while changed:
        changed = False
        for node in range(len(successors)):
            if node == entry or not before[node]:
                continue
            common = everything
            for predecessor in before[node]:
                common &= found[predecessor]
            common |= 1 << node
            changed |= common != found[node]
            found[node] = common
    return found


def _reach(start: int, successors: Sequence[Sequence[int]], without: Sequence[int | None]) -> set[int]:
    """Return the nodes that can be reached from `start`, which is one of them, without passing some."""
    found, waiting = {start}, [start]
    while waiting:
        for successor in successors[waiting.pop()]:
            if successor not in found and successor not in without:
                found.add(successor)
                waiting.append(successor)
    return found


def _bits(nodes: set[int]) -> int:
    return sum(1 << node for node in nodes)
