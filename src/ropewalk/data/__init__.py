"""Packed sequences on disk and the order in which training sees them."""

from ropewalk.data.mds import open_mds
from ropewalk.data.mixture import Mixture, SequenceRef
from ropewalk.data.store import PackedSequence, PackedStore

__all__ = ["Mixture", "PackedSequence", "PackedStore", "SequenceRef", "open_mds"]
