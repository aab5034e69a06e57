"""Machines as a plan assumes them: vendors' figures of memory, arithmetic and links, and assumed shares of them."""

from __future__ import annotations

from dataclasses import dataclass

from seqaware.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU and its share of the node.

    Attributes:
        memory: bytes that torch reports as total. narrow_flops, wide_flops: dense bfloat16 and float32 per second.
        memory_rate, link_rate, network_rate, host_rate, drive_rate: bytes a second, one way: of the GPU's memory, of
            NVLink inside a node, of its network adapter, of PCIe to the CPU, of the node's drives shared by its GPUs.
        host_memory: bytes of CPU memory for each GPU.
        efficiency: share of the arithmetic that long matrix products reach. link_efficiency: share of a link's rate.
        reserve: bytes of the context, of communication and of kernels' scratch; slack: share lost by the allocator.
    """

    name: str
    memory: int
    narrow_flops: float
    wide_flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    host_rate: float = 50e9
    drive_rate: float = 3e9
    host_memory: int = 250 * GIB
    efficiency: float = 0.55
    link_efficiency: float = 0.8
    reserve: int = 3 * GIB
    slack: float = 0.05

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return int((self.memory - self.reserve) * (1 - self.slack))

    def flops(self, dtype: str) -> float:
        """What matrix products in this dtype reach."""
        return self.efficiency * (self.wide_flops if dtype == "float32" else self.narrow_flops)


DEVICES = {
    "h200": Device("H200", 139 * GIB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "h100": Device("H100 80GB", 79 * GIB, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "a100": Device("A100 80GB", 79 * GIB, 312e12, 19.5e12, 2.0e12, 300e9, 25e9, host_rate=25e9),
}


# What torch calls a card -> dense bfloat16 and float32 operations a second, by its data sheet; the first match counts.
PEAKS = (
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
)


def peak_flops(card: str, dtype: str) -> float | None:
    """The data sheet's operations a second of a card, by the name torch gives it; None for a card not known here."""
    for name, narrow, wide in PEAKS:
        if name in card:
            return wide if dtype == "float32" else narrow
    return None


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        ConfigError: it is not there.
    """
    if name.lower() not in DEVICES:
        raise ConfigError("--device is not one that is known here", got=name, do=f"write one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]
