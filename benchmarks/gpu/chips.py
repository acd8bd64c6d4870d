"""What the targets have: the limits that a kernel must keep, and the figures that a prediction divides by."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """A compilation target.

    Attributes:
        target: for Triton's compiler.
        shared: bytes of shared memory that one program may have.
        shared_total: bytes of shared memory of a multiprocessor (compute unit); ``reserved`` of them go with each
            program.
        registers, threads: of a multiprocessor; registers are 32 bit.
        matrix: the instruction family that a half-precision matrix product of a full tile should become.
    """

    target: GPUTarget
    shared: int
    shared_total: int
    reserved: int
    registers: int
    threads: int
    matrix: str

    def resident(self, registers, shared, warps):
        """How many programs fit on a multiprocessor at once; registers are given a warp in steps of 8 a thread."""
        per_program = warps * self.target.warp_size
        by_registers = self.registers // (-(-registers // 8) * 8 * per_program) if registers else 32
        return min(by_registers, self.shared_total // (shared + self.reserved or 1), self.threads // per_program, 32)


def _cuda(capability, shared, shared_total, threads, matrix):
    return Chip(GPUTarget("cuda", capability, 32), shared * KIB, shared_total * KIB, KIB, 65536, threads, matrix)


CHIPS = {
    "sm_80": _cuda(80, 163, 164, 2048, "HMMA"),
    "sm_90": _cuda(90, 227, 228, 2048, "HGMMA"),
    "sm_100": _cuda(100, 227, 228, 2048, "UTCHMMA"),
    "sm_120": _cuda(120, 99, 100, 1536, "HMMA"),
    # Four SIMD units of 512 registers for each of 64 lanes; eight waves each.
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 0, 4 * 512 * 64, 4 * 8 * 64, "MFMA"),
}


@dataclass(frozen=True)
class Device:
    """A card, by its maker's data sheet: dense bf16 FLOP/s, bytes/s of memory, bytes of L2, multiprocessors."""

    chip: str
    flops: float
    bandwidth: float
    l2: int
    processors: int


DEVICES = {
    "A100 SXM 80 GB": Device("sm_80", 312e12, 2.039e12, 40 * KIB**2, 108),
    "H100 SXM": Device("sm_90", 989e12, 3.35e12, 50 * KIB**2, 132),
    "B200": Device("sm_100", 2250e12, 8.0e12, 126 * KIB**2, 148),
}
