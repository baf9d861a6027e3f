"""Simulate the warps of one sub-partition of an SM: issue slots, units, scoreboards, barriers, wgmma and memory.

All four sub-partitions of an SM, and all SMs, do the same at the same time. So one is simulated, with a quarter of what
the SM shares: bandwidth of shared memory, L2 and DRAM. The four warps of a warpgroup are on four sub-partitions, so a
wgmma occupies the tensor core of this one as long as those of the others.

Instructions issue in order, one per cycle. Of the warps that can issue, the last one goes on, else the oldest. A warp
waits for its stall count and scoreboards, as ptxas encoded them, and for a free unit; a warp never diverges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sass_model import constants
from bench.sass_model.control_words import SCOREBOARDS
from bench.sass_model.memory import Memory
from bench.sass_model.pipes import Kind, Step, Unit

Path = Sequence[Step]
_NEVER = float("inf")


@dataclass
class Result:
    """What a simulation counted.

    Attributes:
        ends: The cycle in which each block ended, in order.
        cycles: Cycles until the last block ended and its output was written.
        issued: Issued warp instructions.
        busy: Cycles in which each unit was occupied, the tensor core's "wgmma", "dram" and "l2".
    """

    ends: list[float] = field(default_factory=list)
    cycles: float = 0.0
    issued: int = 0
    busy: dict[str, float] = field(default_factory=dict)

    def utilisation(self) -> dict[str, float]:
        """Return the share of all cycles in which each resource was occupied."""
        fma = (self.busy["FMA_HEAVY"] + self.busy["FMA_LITE"]) / 2
        busy = {**self.busy, "FMA": fma, "issue": float(self.issued)}
        busy["integer multiplication"] = busy.pop("FMA_HEAVY")
        del busy["FMA_LITE"]
        return {name: cycles / self.cycles for name, cycles in busy.items()}


class _Warp:
    """A warp and what it waits for."""

    __slots__ = ("age", "boards", "copies", "groups", "path", "position", "ready", "slot", "stalled")

    def __init__(self, path: Path, slot: int, age: int):
        self.path, self.slot, self.age = path, slot, age
        self.restart(0.0)

    def restart(self, now: float) -> None:
        self.position = 0
        self.stalled = now  # until when the stall count of its last instruction lasts
        self.boards: list[list[float]] = [[] for _ in range(SCOREBOARDS)]  # ends of what each counts
        self.groups: list[float] = []  # ends of groups of wgmma
        self.copies = now  # end of its last LDGSTS
        self.ready = now
        self.find_ready()

    def find_ready(self) -> None:
        """Compute when the next instruction can issue if its unit is free."""
        step = self.path[self.position]
        ready = self.stalled
        for board in step.waits:
            if self.boards[board]:
                ready = max(ready, *self.boards[board])
                self.boards[board].clear()
        if step.kind == Kind.WAIT_BOARD:
            ready = max(ready, _left(self.boards[int(step.barrier)], int(step.amount)))
        elif step.kind == Kind.WAIT_WGMMA:
            ready = max(ready, _left(self.groups, int(step.amount)))
        self.ready = ready


def _left(ends: list[float], pending: int) -> float:
    """Return when at most `pending` of what ends at these times, in order, are left; forget those that ended."""
    if len(ends) <= pending:
        return 0.0
    end = max(ends[: len(ends) - pending])
    del ends[: len(ends) - pending]
    return end


class SubPartition:
    """A sub-partition that runs blocks of one kernel, some at a time.

    Args:
        paths: The path of each warp of a block that is on this sub-partition.
        slots: Blocks that are resident at a time.
        memory: Its share of device memory.
    """

    def __init__(self, paths: Sequence[Path], slots: int, memory: Memory):
        self.memory = memory
        self.result = Result()
        self._warps = [
            _Warp(path, slot, len(paths) * slot + i) for slot in range(slots) for i, path in enumerate(paths)
        ]
        self._running = [len(paths)] * slots  # warps of each slot's block that have not ended
        self._free = [0.0] * len(Unit)
        self._busy = [0.0] * len(Unit)
        self._tensor_free = self._tensor_busy = 0.0
        self._arrived: dict[tuple[int, str], list[_Warp]] = {}

    def run(self, blocks: int) -> Result:
        """Run this many blocks, each free slot taking the next one.

        Raises:
            RuntimeError: No warp can go on: a barrier waits for warps that have ended.
        """
        waiting = blocks - len(self._running)
        active = [warp for warp in self._warps if warp.slot < blocks]
        last: _Warp | None = None
        issue = 0.0
        while active:
            warp, now = self._next(active, last, issue)
            issue, last = now + 1, warp
            self.result.issued += 1
            self._issue(warp, warp.path[warp.position], now)
            warp.position += 1
            if warp.position < len(warp.path):
                if warp.ready != _NEVER:
                    warp.find_ready()
                continue
            self._running[warp.slot] -= 1
            warp.ready = _NEVER
            if self._running[warp.slot]:
                active.remove(warp)
                continue
            self.result.ends.append(now)
            block = [one for one in self._warps if one.slot == warp.slot]
            active = [one for one in active if one.slot != warp.slot]
            if waiting > 0:
                waiting -= 1
                self._running[warp.slot] = len(block)
                for one in block:
                    one.restart(now + constants.BLOCK_START)
                active += block
                active.sort(key=lambda one: one.age)
        self._count()
        return self.result

    def _next(self, active: list[_Warp], last: _Warp | None, issue: float) -> tuple[_Warp, float]:
        """Return the warp that issues next, and when."""
        free = self._free
        best, best_time = None, _NEVER
        for warp in active:
            time = max(warp.ready, issue)
            units = warp.path[warp.position].units if warp.ready != _NEVER else ()
            if units:
                time = max(time, free[units[0]] if len(units) == 1 else min(free[unit] for unit in units))
            if time < best_time or (time == best_time and warp is last):
                best, best_time = warp, time
        if best is None or best_time == _NEVER:
            stuck = {(warp.slot, name) for (_, name), warps in self._arrived.items() for warp in warps}
            raise RuntimeError(f"no warp can go on: blocks wait at barriers {sorted(stuck)}")
        return best, best_time

    def _issue(self, warp: _Warp, step: Step, now: float) -> None:
        if step.units:
            unit = min(step.units, key=self._free.__getitem__)
            self._free[unit] = now + step.cycles
            self._busy[unit] += step.cycles
        done = now + step.latency + step.cycles
        warp.stalled = now + step.stall
        if step.kind != Kind.PLAIN:
            done = self._special(warp, step, now, done)
        if step.result >= 0:
            warp.boards[step.result].append(done)
        if step.sources >= 0:
            warp.boards[step.sources].append(now + step.cycles + constants.READ_RELEASE)

    def _special(self, warp: _Warp, step: Step, now: float, done: float) -> float:
        """Do what only this kind of step does; return when its result is there."""
        if step.kind == Kind.LOAD:
            return self.memory.load(now + step.cycles, step.amount)
        if step.kind == Kind.COPY:
            warp.copies = max(warp.copies, self.memory.load(now + step.cycles, step.amount))
            return warp.copies
        if step.kind == Kind.COMMIT:
            if step.result < 0:  # it is scoreboard 0 that counts copies
                warp.boards[0].append(warp.copies)
            return warp.copies
        if step.kind == Kind.STORE:
            self.memory.store(now + step.cycles, step.amount)
        elif step.kind == Kind.WGMMA:
            self._tensor_free = max(self._tensor_free, now + constants.WGMMA_START) + step.cycles
            self._tensor_busy += step.cycles
            done = self._tensor_free
            if step.ends_group:
                warp.groups.append(self._tensor_free + constants.WGMMA_DRAIN)
        elif step.kind == Kind.FENCE:
            warp.stalled = now + max(step.amount, step.stall)
        elif step.kind == Kind.BARRIER:
            self._arrive(warp, step, now)
        return done

    def _arrive(self, warp: _Warp, step: Step, now: float) -> None:
        """Let the warp wait at a barrier, or release all warps that wait there if it is the last."""
        key = warp.slot, step.barrier
        arrived = self._arrived.setdefault(key, [])
        arrived.append(warp)
        warp.ready = _NEVER
        of_block = sum(1 for one in self._warps if one.slot == warp.slot)
        expected = max(step.threads // 128, 1) if step.threads else of_block
        if len(arrived) < min(expected, of_block):
            return
        del self._arrived[key]
        for one in arrived:
            one.stalled = max(one.stalled, now + constants.BARRIER)
            if one is warp:  # its position is advanced by the caller
                one.ready = 0.0
            else:
                one.find_ready()

    def _count(self) -> None:
        self.result.cycles = max(self.result.ends[-1], self.memory.idle_from)
        busy = {unit.name: self._busy[unit] for unit in Unit}
        self.result.busy = busy | {"wgmma": self._tensor_busy, "dram": self.memory.dram_busy, "l2": self.memory.l2_busy}
