"""Peak arithmetic of accelerators, to say what share of it a run used (MFU).

Dense matrix products, no sparsity, from the makers' data sheets: bfloat16 tensor cores, and float32 without TF32.
"""

from __future__ import annotations

#: part of the device's name -> (bfloat16, float32) in FLOP/s; the first that fits counts
PEAKS = {
    "GB200": (2.5e15, 80e12),
    "B200": (2.25e15, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device at "bf16" or "fp32", or None where it is not known: a CPU, another GPU."""
    for part, (bfloat16, float32) in PEAKS.items():
        if part in device_name:
            return bfloat16 if precision == "bf16" else float32
    return None
