"""Position methods as spectra: compose them, compile them to stock engines."""

from ropewalk.rope.chain import RopeChain
from ropewalk.rope.position import Position
from ropewalk.rope.registry import (
    PRETRAINED_LENGTH,
    TRAINED_LENGTH,
    Tokens,
    available_methods,
    register_method,
    stretched,
)
from ropewalk.rope.spectrum import Spectrum

# Last: it fills the registry, and a method's module may import the names above from here.
from ropewalk.rope import methods as methods  # isort: skip

__all__ = [
    "PRETRAINED_LENGTH",
    "TRAINED_LENGTH",
    "Position",
    "RopeChain",
    "Spectrum",
    "Tokens",
    "available_methods",
    "register_method",
    "stretched",
]
