"""Position methods: pure functions Spectrum -> Spectrum, registered on import.

Every module here is imported, so a new method is one function in any of them or in a file of its own.

In the docstrings i = 0..d/2-1 counts the pairs of a head of d channels; theta_i is the i-th frequency of the spectrum
that the method is given. b is the base, L the length that the method names, s the scaling factor (new over old length).
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
