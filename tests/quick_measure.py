"""``python -m fft.plan.measure`` in no time, so that figures are poor: as a module for ranks, and for a test's own."""

from fft.errors import run_cli
from fft.plan import device_rates
from fft.plan.measure import main

#: Of :mod:`fft.plan.device_rates`.
SMALL: dict[str, object] = {
    "_LONG": 1e-4,
    "_PRODUCTS": {True: ((64, 64), (128, 128))},
    "_DOCUMENTS": {True: (32, 64)},
    "_ELEMENTS": {True: 1 << 16},
}

if __name__ == "__main__":
    for _name, _value in SMALL.items():
        setattr(device_rates, _name, _value)
    run_cli(main)
