"""Proofs that engines reproduce an export."""
