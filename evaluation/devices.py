"""What GPUs can do at most, by their makers' data sheets: the roof that `benchmarks.roofline` measures against.

To add one, add a line: dense figures, not those "with sparsity", and with float32 accumulation, as PyTorch has it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks of one GPU.

    Attributes:
        bandwidth: bytes per second from and to its memory.
        peak: floating point operations per second of its tensor cores, in 16 bits.
        peak_int8: operations per second in 8-bit integers; None where its tensor cores have none, and bitsandbytes no int8.
        memory: bytes.
        bfloat16: whether the tensor cores know it.
        source: where the figures are from.
        nf4_rows: up to how many rows of input bitsandbytes multiplies packed 4-bit weights; for more it unpacks them first.
    """

    bandwidth: float
    peak: float
    peak_int8: float | None
    memory: float
    bfloat16: bool
    source: str
    nf4_rows: int = 4


# bitsandbytes 0.50 keeps the 4-bit weights of 7B layers packed for 4 rows everywhere, for no more than some 30 where memory is
# fast (HBM), and for some 30 to 130 where it is slow (GDDR): its `_gemm_4bit_use_custom_cuda`. Before, it did for one row.
_GDDR_ROWS = 64
_AMPERE_GA102 = "NVIDIA Ampere GA102 whitepaper v2"
_ADA = "NVIDIA Ada whitepaper v2"

DEVICES = {
    "V100": Device(900e9, 112e12, None, 32e9, False, "NVIDIA V100 data sheet, PCIe"),
    "V100-SXM2": Device(900e9, 125e12, None, 32e9, False, "NVIDIA V100 data sheet, SXM2"),
    "T4": Device(320e9, 65e12, 130e12, 16e9, False, "NVIDIA T4 data sheet", _GDDR_ROWS),
    "A6000": Device(768e9, 154.8e12, 309.7e12, 48e9, True, _AMPERE_GA102, _GDDR_ROWS),
    "RTX3090": Device(936e9, 71e12, 284e12, 24e9, True, _AMPERE_GA102, _GDDR_ROWS),
    "RTX4090": Device(1008e9, 165.2e12, 660.6e12, 24e9, True, _ADA, _GDDR_ROWS),
    "L4": Device(300e9, 121e12, 242e12, 24e9, True, "NVIDIA L4 data sheet", _GDDR_ROWS),
    "L40S": Device(864e9, 362e12, 733e12, 48e9, True, "NVIDIA L40S data sheet", _GDDR_ROWS),
    "A100-40GB": Device(1555e9, 312e12, 624e12, 40e9, True, "NVIDIA A100 data sheet, 40 GB"),
    "A100": Device(2039e9, 312e12, 624e12, 80e9, True, "NVIDIA A100 data sheet, 80 GB SXM"),
    "H100-PCIe": Device(2000e9, 756e12, 1513e12, 80e9, True, "NVIDIA H100 data sheet, PCIe"),
    "H100": Device(3350e9, 989e12, 1979e12, 80e9, True, "NVIDIA H100 data sheet, SXM"),
    "H200": Device(4800e9, 989e12, 1979e12, 141e9, True, "NVIDIA H200 data sheet, SXM"),
}


def find_device(name: str, precision: str = "fp16") -> Device:
    """The device of that name, in any case.

    Raises:
        ValueError: for a name that is not listed, and for a precision that its tensor cores do not compute in.
    """
    devices = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() not in devices:
        raise ValueError(f"device={name!r} is not listed: choose from {', '.join(DEVICES)}, or add it to {__file__}.")
    device = devices[name.lower()]
    if precision == "bf16" and not device.bfloat16:
        raise ValueError(f"precision='bf16': the tensor cores of {name} have no bfloat16. Use 'fp16'.")
    if precision == "int8" and device.peak_int8 is None:
        raise ValueError(
            f"precision='int8': the tensor cores of {name} have no 8-bit integers, which bitsandbytes' int8 needs. Use "
            "'nf4' or 'fp16'."
        )
    return device
