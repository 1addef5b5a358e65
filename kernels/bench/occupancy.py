"""How many programs of a kernel one multiprocessor holds, from what the kernel uses and each architecture has.

Source: CUDA C++ Programming Guide, technical specifications by compute capability; registers are given to warps by 256,
to multiples of four warps, shared memory by 128 bytes, of which the driver takes 1 KB a program.
"""

from dataclasses import dataclass

REGISTERS = 65_536
"""Of a multiprocessor, 32 bits each; of every architecture here."""
WARP = 32
WARPS_TOGETHER = 4
REGISTERS_TOGETHER = 256
SHARED_TOGETHER = 128
OF_DRIVER = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one holds at a time. shared: KB of all programs. shared_each: KB of one."""

    warps: int
    programs: int
    shared: int
    shared_each: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164, 163),
    86: Multiprocessor(48, 16, 100, 99),
    89: Multiprocessor(48, 24, 100, 99),
    90: Multiprocessor(64, 32, 228, 227),
    100: Multiprocessor(64, 32, 228, 227),
    120: Multiprocessor(48, 24, 100, 99),
}
"""By compute capability."""


def programs_at_once(capability: int, warps: int, registers: int, shared_bytes: int) -> int:
    """Programs of ``warps`` warps, with ``registers`` a thread and ``shared_bytes`` each, on one multiprocessor.

    0: none fits, and the launch fails.
    """
    has = MULTIPROCESSORS[capability]
    if shared_bytes > has.shared_each * 1024:
        return 0
    of_warp = _up(registers * WARP, REGISTERS_TOGETHER)
    by_registers = REGISTERS // of_warp // WARPS_TOGETHER * WARPS_TOGETHER // warps
    by_shared = has.shared * 1024 // (_up(shared_bytes, SHARED_TOGETHER) + OF_DRIVER)
    return min(has.programs, has.warps // warps, by_registers, by_shared)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
