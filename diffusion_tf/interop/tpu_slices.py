"""Cloud TPU slices: published figures of their chips, and the least times that follow from them."""

import dataclasses

_GIB = 2**30  # bytes


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a TPU chip.

    Attributes:
      devices: devices that one chip presents to a program: one for each core, or one for all.
      flops_per_second: peak of bfloat16 matrix products.
      hbm_bytes: memory.
      hbm_bytes_per_second: memory bandwidth.
      link_bytes_per_second: bandwidth of one link to a neighbouring chip, in one direction.
      clock_hertz: clock of the cycles that the compiler counts; None: unknown.
    """

    devices: int
    flops_per_second: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    clock_hertz: float | None


# Peak and HBM: cloud.google.com/tpu/docs/v3, v4, v5e and v6e. v2, and the clock and links of v3 (496 and 656 Gbit/s):
# Jouppi et al., "A Domain-Specific Supercomputer for Training Deep Neural Networks", CACM 2020. Clock and links of v4:
# Jouppi et al., "TPU v4: An Optically Reconfigurable Supercomputer", ISCA 2023. Links of v5e and v6e: the pages state
# 400 and 800 GB/s for four links in both directions. Clock of v5e: its peak divided by the operations per cycle of four
# 128x128 matrix units; the same division gives the published clocks of v2 to v4. The pages about v6e disagree on the
# number of its matrix units, so its clock is unknown.
CHIPS = {
    "v2": Chip(2, 46e12, 16 * _GIB, 700e9, 62e9, 700e6),
    "v3": Chip(2, 123e12, 32 * _GIB, 900e9, 82e9, 940e6),
    "v4": Chip(1, 275e12, 32 * _GIB, 1200e9, 50e9, 1050e6),
    "v5e": Chip(1, 197e12, 16 * _GIB, 819e9, 50e9, 1500e6),
    "v6e": Chip(1, 918e12, 32 * _GIB, 1638e9, 100e9, None),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, of one host or several.

    Attributes:
      chip_type: the type of its chips, a name in CHIPS.
      num_chips: the number of chips, through which a ring of links leads.
      libtpu_name: libtpu's name of the slice.
      chip_config: libtpu's name for the use of a chip's cores, where there is a choice; `megacore`: as one device.
    """

    chip_type: str
    num_chips: int
    libtpu_name: str
    chip_config: str | None = None

    @property
    def chip(self) -> Chip:
        """The figures of its chips."""
        return CHIPS[self.chip_type]

    @property
    def num_devices(self) -> int:
        """The number of devices; each runs one replica."""
        return self.num_chips * self.chip.devices

    @property
    def hbm_bytes(self) -> int:
        """The memory of one device."""
        return self.chip.hbm_bytes // self.chip.devices


TOPOLOGIES = {
    "v2-8": Topology("v2", 4, "v2:2x2x1"),
    "v3-8": Topology("v3", 4, "v3:2x2x1"),
    "v3-32": Topology("v3", 16, "v3:4x4x1"),
    "v4-8": Topology("v4", 4, "v4:2x2x1", "megacore"),
    "v5e-8": Topology("v5e", 8, "v5e:2x4"),
    "v5e-16": Topology("v5e", 16, "v5e:4x4"),
    "v6e-8": Topology("v6e", 8, "v6e:2x4"),
}


def roofline_seconds(flops: float, bytes_accessed: float, chip: Chip) -> float:
    """Returns the least time that one device needs: max(flops / peak, bytes / HBM bandwidth)."""
    return chip.devices * max(flops / chip.flops_per_second, bytes_accessed / chip.hbm_bytes_per_second)


def all_reduce_seconds(num_bytes: float, topology: Topology) -> float:
    """Returns the time of an all-reduce of `num_bytes` per device, without latency or other traffic.

    A ring of n chips that sends both ways takes 2 (n - 1) / n * bytes / (2 * link). A chip with two devices first sums
    the two (two reads, one write) and at last copies the result (one read, one write): 5 * bytes / HBM bandwidth more.
    """
    chip, n = topology.chip, topology.num_chips
    ring = (n - 1) / n * num_bytes / chip.link_bytes_per_second
    return ring + (5 * num_bytes / chip.hbm_bytes_per_second if chip.devices == 2 else 0.0)
