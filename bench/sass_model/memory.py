"""Device memory as a sub-partition sees it: its share of the bandwidth of L2 and DRAM, and their latency."""

from __future__ import annotations

from bench.sass_model import constants
from bench.sass_model.constants import Gpu


class Memory:
    """A sub-partition's share of L2 and DRAM: queues that serve bytes in order at a fixed rate.

    Which loads miss is not modelled: every load has the same share of bytes from DRAM and L2, and their mean latency.

    Attributes:
        dram_busy: Cycles in which DRAM served this share.
        l2_busy: Cycles in which L2 did.

    Args:
        gpu: The GPU.
        dram_share: Share of the loaded bytes that come from DRAM, through L2.
        l2_share: Share that comes from L2, those of DRAM included; the others are in the SM's L1 cache.
        store_share: Share of the bytes of store instructions that are written: not those of lanes or of branches that a
            case leaves out.
        mean: Bytes that a sub-partition moves on average, relative to this one.
    """

    def __init__(
        self, gpu: Gpu, dram_share: float = 1.0, l2_share: float = 1.0, store_share: float = 1.0, mean: float = 1.0
    ):
        parts = gpu.sms * constants.SUB_PARTITIONS
        self.dram_busy = self.l2_busy = 0.0
        self._dram_cycles = mean * gpu.clock * parts / gpu.copy_bandwidth  # per byte
        self._l2_cycles = mean * constants.SUB_PARTITIONS / constants.L2_BYTES
        self._dram_share, self._l2_share, self._store_share = dram_share, l2_share, store_share
        self._latency = (
            constants.L1_LATENCY * (1 - l2_share)
            + constants.L2_LATENCY * (l2_share - dram_share)
            + constants.DRAM_LATENCY * dram_share
        )
        self._dram_free = self._l2_free = 0.0

    def load(self, now: float, size: float) -> float:
        """Return when `size` bytes that are requested now have arrived."""
        return self._serve(now, size * self._l2_share, size * self._dram_share) + self._latency

    def store(self, now: float, size: float) -> None:
        """Write the stored share of `size` bytes to DRAM; nothing waits for that."""
        self._serve(now, size * self._store_share, size * self._store_share)

    @property
    def idle_from(self) -> float:
        """The cycle in which the last byte of what was requested so far has passed."""
        return max(self._l2_free, self._dram_free)

    def _serve(self, now: float, l2_bytes: float, dram_bytes: float) -> float:
        l2, dram = l2_bytes * self._l2_cycles, dram_bytes * self._dram_cycles
        self.l2_busy += l2
        self.dram_busy += dram
        self._l2_free = max(self._l2_free, now) + l2
        self._dram_free = max(self._dram_free, now) + dram
        return max(self._l2_free if l2 else now, self._dram_free if dram else now)
