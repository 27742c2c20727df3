"""An amount of memory as people write it: "16GiB", "512 MB", or a number of bytes."""

from __future__ import annotations

import re

from gradfold.errors import OptionError

__all__: list[str] = []

_UNITS = {
    **{"": 1, "b": 1},
    **{
        unit: 2**power
        for power, units in ((10, "k"), (20, "m"), (30, "g"), (40, "t"))
        for unit in (units, f"{units}ib")
    },
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", start=1)},
}


def read_bytes(amount: int | str) -> int:
    """The number of bytes; KiB, MiB, GiB and TiB (or K, M, G, T) are powers of 1024, KB, MB, GB and TB of 1000.

    Raises:
        OptionError: this is no amount.

    >>> read_bytes("16GiB") == 16 * 2**30 == read_bytes("16 G"), read_bytes("1.5 GB")
    (True, 1500000000)
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower()) if isinstance(amount, str) else None
    if found is None or found[2] not in _UNITS or int(float(found[1]) * _UNITS[found[2]]) < 1:
        raise OptionError(f"memory={amount!r}; expected an amount such as '16GiB', '512MiB' or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2]])


def written(num_bytes: int) -> str:
    """Bytes in the unit that fits.

    >>> written(3 * 2**29), written(5000)
    ('1.50 GiB', '5 KiB')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB"
