"""What launches cost by counting: bytes through the L2 cache and to memory, floating-point operations, waves.

A launch is a list of programs; a program is a list of touches of named blocks of memory, in the order it makes them,
and the operations it executes. The L2 is simulated, not assumed: the programs that are resident at once make their
touches side by side, each at its own pace, and blocks stay by least recent use.
"""

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

# Each half of the L2 of the chips here may keep its own copy of a line.
USABLE_L2 = 0.5


class Touch(NamedTuple):
    """A read or write of some bytes of a block. ``size``: of the whole block, which is what a miss brings in."""

    block: tuple
    size: int
    bytes: int
    write: bool = False


class Program(NamedTuple):
    touches: list
    flops: float = 0.0


@dataclass
class Launch:
    """``resident``: how many programs a multiprocessor holds at once."""

    name: str
    programs: list = field(repr=False)
    resident: int = 2

    @property
    def flops(self):
        return sum(program.flops for program in self.programs)


@dataclass
class Cost:
    """Of one launch. ``seconds``: the slower of memory and arithmetic, and the launch itself."""

    l2_bytes: int
    memory_bytes: int
    flops: float
    waves: float
    balance: float
    seconds: float


def costs(launches, device, launch_seconds):
    """The :class:`Cost` of launches that follow one another on a device, from a cold cache.

    Arithmetic: resident programs share the multiprocessor's peak equally and start in order as others finish, so a last
    wave that is not full, and a program longer than the others, cost time (``balance``: the part of the peak that is
    left).
    """
    cache, result = _Cache(USABLE_L2 * device.l2), []
    for launch in launches:
        slots = device.processors * min(launch.resident, max(1, -(-len(launch.programs) // device.processors)))
        l2, memory = _run(launch.programs, slots, cache, device)
        span = _makespan([program.flops for program in launch.programs], slots)
        ideal = launch.flops / slots
        seconds = max(memory / device.bandwidth, span * slots / device.flops) + launch_seconds
        result.append(
            Cost(l2, memory, launch.flops, len(launch.programs) / slots, ideal / span if span else 1.0, seconds)
        )
    return result


def stream(name, reads, writes, parts):
    """A launch over whole tensors once: ``reads`` and ``writes`` are ``{tensor: bytes}``, in ``parts`` programs."""
    programs = []
    for part in range(parts):
        touches = [Touch((tensor, part), size // parts, size // parts) for tensor, size in reads.items()]
        touches += [Touch((tensor, part), size // parts, size // parts, True) for tensor, size in writes.items()]
        programs.append(Program(touches))
    return Launch(name, programs, resident=8)


class _Cache:
    """Least recently used blocks, written back when they are dropped; what is left at the end is written back too.

    A written block therefore counts once when it becomes dirty, however often it is written until it is dropped.
    """

    def __init__(self, capacity):
        self.capacity, self.used, self.blocks = capacity, 0, OrderedDict()  # block -> (size, dirty)

    def touch(self, touch):
        """The bytes that move between the cache and memory."""
        size, dirty = self.blocks.pop(touch.block, (0, False))
        moved = 0
        if not size:
            size = touch.size
            self.used += size
            moved += 0 if touch.write else size  # whole lines are written: nothing to read first
        if touch.write and not dirty:
            moved += size
        self.blocks[touch.block] = size, dirty or touch.write
        while self.used > self.capacity and self.blocks:
            _, (dropped, _) = self.blocks.popitem(last=False)
            self.used -= dropped
        return moved


def _run(programs, slots, cache, device):
    """Bytes through the L2 and to memory.

    Programs start in order as slots fall free, and spread their touches evenly over the time they take: the longer of
    arithmetic and bytes at a slot's share of the device.
    """
    l2 = memory = 0
    waiting, events = iter(enumerate(programs)), []

    def start(now):
        for number, program in waiting:
            if program.touches:
                size = sum(touch.bytes for touch in program.touches)
                seconds = slots * max(program.flops / device.flops, size / device.bandwidth)
                heapq.heappush(events, (now, number, 0, seconds / len(program.touches), program.touches))
                return

    for _ in range(slots):
        start(0.0)
    while events:
        now, number, i, step, touches = heapq.heappop(events)
        l2 += touches[i].bytes
        memory += cache.touch(touches[i])
        if i + 1 < len(touches):
            heapq.heappush(events, (now + step, number, i + 1, step, touches))
        else:
            start(now + step)
    return l2, memory


def _makespan(lengths, slots):
    """When the last of the programs ends if each goes, in order, to the slot that is free first."""
    free = [0.0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free, default=0.0)
