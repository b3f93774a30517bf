"""Visuals from files and from drawn scenes, packed with their questions."""
