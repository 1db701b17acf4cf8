"""What stated devices can do at best, and the least time that an operation takes there.

Peaks are datasheet figures for dense matrix arithmetic, two FLOPs to a MAC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..core.errors import UsageError
from ..core.numbers import parse_count


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What a device can do at best; a profile of one's own can be given wherever a name can.

    Attributes:
        name: Short name, as users give it.
        label: What it is.
        macs_per_s: Peak MACs per second by dtype; must have ``torch.float32``, which stands for any dtype not listed.
        source: Where the figures come from.
    """

    name: str
    label: str
    macs_per_s: Mapping[torch.dtype, float]
    bytes_per_s: float
    source: str

    def peak(self, dtype: torch.dtype) -> float:
        """Peak MACs per second in ``dtype``."""
        return self.macs_per_s.get(dtype, self.macs_per_s[torch.float32])

    def ridge(self, dtype: torch.dtype) -> float:
        """MACs per byte from which an operation in ``dtype`` is compute-bound."""
        return self.peak(dtype) / self.bytes_per_s


def _peaks(
    tflops32: float, tflops16: float, *, bfloat16: bool = True, tflops64: float = 0.0
) -> Mapping[torch.dtype, float]:
    peaks = {torch.float32: tflops32 * 5e11, torch.float16: tflops16 * 5e11}
    peaks[torch.bfloat16] = (tflops16 if bfloat16 else tflops32) * 5e11
    if tflops64:
        peaks[torch.float64] = tflops64 * 5e11
    return peaks


_PROFILES = (
    DeviceProfile(
        "cpu",
        "desktop CPU: 8 cores with AVX2 at 3 GHz, two channels of DDR4-3200",
        _peaks(0.768, 0.768, tflops64=0.384),
        51.2e9,
        "arithmetic: 8 cores × 2 FMA units × 8 float32 lanes × 3 GHz = 384 GMAC/s; 2 × 25.6 GB/s. No 16-bit arithmetic",
    ),
    DeviceProfile(
        "server-cpu",
        "server CPU: 32 cores with AVX-512 at 2.5 GHz, eight channels of DDR4-3200",
        _peaks(5.12, 5.12, tflops64=2.56),
        204.8e9,
        "arithmetic: 32 cores × 2 FMA units × 16 float32 lanes × 2.5 GHz = 2.56 TMAC/s; 8 × 25.6 GB/s. No 16-bit",
    ),
    DeviceProfile(
        "t4",
        "NVIDIA T4 16 GB",
        _peaks(8.1, 65.0, bfloat16=False),
        320e9,
        "NVIDIA T4 datasheet: 8.1 TFLOPS FP32, 65 TFLOPS mixed FP16/FP32, 320 GB/s GDDR6; no bfloat16 tensor cores",
    ),
    DeviceProfile(
        "v100",
        "NVIDIA V100 SXM2",
        _peaks(15.7, 125.0, bfloat16=False, tflops64=7.8),
        900e9,
        "NVIDIA V100 datasheet: 15.7 TFLOPS FP32, 125 TFLOPS tensor, 7.8 TFLOPS FP64, 900 GB/s; no bfloat16",
    ),
    DeviceProfile(
        "a100",
        "NVIDIA A100 SXM 80 GB; float32 as TF32, torch's default for convolutions",
        _peaks(156.0, 312.0, tflops64=19.5),
        2039e9,
        "NVIDIA A100 datasheet, dense: 156 TFLOPS TF32, 312 TFLOPS FP16 and BF16, 19.5 TFLOPS FP64 tensor, 2,039 GB/s",
    ),
    DeviceProfile(
        "h100",
        "NVIDIA H100 SXM 80 GB; float32 as TF32, torch's default for convolutions",
        _peaks(494.7, 989.4, tflops64=66.9),
        3350e9,
        "NVIDIA H100 datasheet (its figures are with sparsity; halved here): 989 TFLOPS TF32, 1,979 TFLOPS FP16 and "
        "BF16; 67 TFLOPS FP64 tensor; 3.35 TB/s",
    ),
    DeviceProfile(
        "jetson-orin",
        "NVIDIA Jetson AGX Orin 64 GB, GPU only; float32 on the CUDA cores",
        _peaks(5.3, 42.5),
        204.8e9,
        "NVIDIA Jetson AGX Orin technical brief: 5.3 TFLOPS FP32; 170 sparse INT8 TOPS on the GPU's tensor cores, of "
        "which dense FP16 is a quarter; 204.8 GB/s LPDDR5",
    ),
)

DEVICES: dict[str, DeviceProfile] = {profile.name: profile for profile in _PROFILES}


def device_profile(device: str | DeviceProfile) -> DeviceProfile:
    """The profile of a name, or of a peak and a bandwidth such as ``82.6T,1008G``, or the profile given."""
    if isinstance(device, DeviceProfile):
        return device
    profile = DEVICES.get(str(device).lower())
    flops, comma, bandwidth = str(device).partition(",")
    if profile is None and comma:
        peak = parse_count(flops, "the peak of the device") / 1e12
        limit = parse_count(bandwidth, "the bandwidth of the device")
        return DeviceProfile(str(device), "a device as given", _peaks(peak, peak), float(limit), "given")
    if profile is None:
        hint = "give the peak in FLOP/s and the bandwidth in bytes/s from the data sheet instead: 82.6T,1008G"
        raise UsageError(f"no device profile is called {str(device)!r}", expected=", ".join(DEVICES), hint=hint)
    return profile


class Bound(NamedTuple):
    """Roofline class of an operation (``""`` where nothing runs), its intensity, and the least seconds it takes."""

    bound: str
    intensity: float
    seconds: float


def bound(macs: int, nbytes: int, dtype: torch.dtype, device: DeviceProfile) -> Bound:
    """Roofline class of so many MACs and bytes in ``dtype``."""
    if not macs and not nbytes:
        return Bound("", 0.0, 0.0)
    compute, transfer = macs / device.peak(dtype), nbytes / device.bytes_per_s
    if compute >= transfer:
        return Bound("compute", macs / nbytes if nbytes else 0.0, compute)
    return Bound("memory", macs / nbytes, transfer)
