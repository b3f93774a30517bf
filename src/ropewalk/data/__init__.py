"""Packed sequences on disk and the order in which training sees them."""

from ropewalk.data.mds.mds_reader import open_mds
from ropewalk.data.order.mixture import Mixture, SequenceRef
from ropewalk.data.store.reader import PackedSequence, PackedStore

__all__ = ["Mixture", "PackedSequence", "PackedStore", "SequenceRef", "open_mds"]
