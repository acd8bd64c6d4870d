"""What a compiled kernel contains, from its machine code: registers, spills, matrix instructions, wide accesses."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")
# The value behind a name of the metadata at the end of AMD's assembly.
_METADATA = re.compile(r"^\s+(?:- )?\.(\w+_count|\w+_fixed_size):\s+(\d+)", re.MULTILINE)
_AMD_INSTRUCTION = re.compile(r"^\t([a-z]\w+)", re.MULTILINE)
_DOT = re.compile(r"\btt\.dot .*?: tensor<[\dx]+x(\w+)")

_MATRIX = {  # family -> what its mnemonics begin with
    "HMMA": ("HMMA",), "HGMMA": ("HGMMA",), "UTCHMMA": ("UTCHMMA",), "IMMA": ("IMMA", "IGMMA", "UTCIMMA"),
    "MFMA": ("v_mfma",),
}  # fmt: skip
_BULK = ("UBLKCP", "UTMALDG", "UTMASTG")  # whole tiles, by the tensor memory accelerator


@dataclass(frozen=True)
class Contents:
    """Counts are of instructions in the code, not of executions. Sizes are bytes.

    Attributes:
        matrix: family -> matrix instructions, those that occur.
        fma: FFMA (v_fma_f32, v_fmac_f32), packed ones included.
        wide_loads, loads: loads of 16 bytes a thread or of whole tiles, and all, from global memory.
        wide_stores, stores: the same for stores.
        spills: bytes of stack, local memory or scratch, or loads and stores of it where the compiler does not say how
            many bytes.
        lanes: scalars that AMD's compiler keeps in lanes of vector registers: an instruction each way, but no memory.
        half_dots, float_dots: matrix products of the source with fp16 or bf16, and with other operands.
        scalar_dots: matrix products that the compiler left to fused multiply-adds.
    """

    registers: int
    shared: int
    spills: int
    lanes: int
    matrix: dict = field(hash=False)
    fma: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    code: int
    half_dots: int
    float_dots: int
    scalar_dots: int

    @property
    def half_dots_without_matrix(self):
        """Whether a product of halves is made of multiply-adds; the compiler widens its operands, so count."""
        return self.half_dots > 0 and (not self.matrix or (self.scalar_dots > 0 and self.float_dots == 0))


def inspect(compiled):
    """The :class:`Contents` of a ``CompiledKernel`` for NVIDIA or AMD."""
    read = _read_cubin if "cubin" in compiled.asm else _read_amdgcn
    dots = Counter("half" if kind in ("f16", "bf16") else "float" for kind in _DOT.findall(compiled.asm["ttir"]))
    scalar = sum(
        "tt.dot " in line and "-> tensor" in line and "#blocked" in line for line in compiled.asm["ttgir"].splitlines()
    )
    return Contents(
        **read(compiled),
        shared=compiled.metadata.shared,
        half_dots=dots["half"],
        float_dots=dots["float"],
        scalar_dots=scalar,
    )


def _read_cubin(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        names = Counter(_INSTRUCTION.findall(_run("nvdisasm", "-c", file.name)))
    resources = {name: int(value) for name, value in _RESOURCES.findall(usage)}
    spilling = _count(names, lambda n: n.split(".")[0] in ("LDL", "STL"))
    return _counts(
        names,
        {
            "registers": resources["REG"],
            "spills": max(resources["STACK"] + resources["LOCAL"], spilling),
            "lanes": 0,
            "fma": _count(names, lambda n: n.startswith("FFMA")),
            "code": 16 * names.total(),
        },
        loads=("LDG.", "LDGSTS.", "UBLKCP", "UTMALDG"),
        stores=("STG.", "UTMASTG"),
        wide=lambda n: ".128" in n or ".ENL2.256" in n or n.startswith(_BULK),
    )


def _read_amdgcn(compiled):
    text = compiled.asm["amdgcn"]
    names, metadata = (
        Counter(_AMD_INSTRUCTION.findall(text)),
        {name: int(value) for name, value in _METADATA.findall(text)},
    )
    length = re.search(r"codeLenInByte = (\d+)", text)
    return _counts(
        names,
        {
            "registers": metadata["vgpr_count"],  # accumulation registers are counted among them
            "spills": metadata["private_segment_fixed_size"],
            "lanes": metadata["sgpr_spill_count"],
            "fma": _count(names, lambda n: re.match(r"v_(pk_)?fma(c|_f32|k)", n)),
            "code": int(length[1]) if length else 0,
        },
        loads=("global_load", "buffer_load"),
        stores=("global_store", "buffer_store"),
        wide=lambda n: n.endswith("dwordx4"),
    )


def _counts(names, known, *, loads, stores, wide):
    def starting_with(prefixes):
        return _count(names, lambda n: n.startswith(prefixes))

    matrix = {family: starting_with(prefixes) for family, prefixes in _MATRIX.items()}
    return known | {
        "matrix": {family: count for family, count in matrix.items() if count},
        "loads": starting_with(loads),
        "wide_loads": _count(names, lambda n: n.startswith(loads) and wide(n)),
        "stores": starting_with(stores),
        "wide_stores": _count(names, lambda n: n.startswith(stores) and wide(n)),
    }


def _count(names, belongs):
    return sum(count for name, count in names.items() if belongs(name))


def _run(tool, *arguments):
    return subprocess.run([_TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
