"""The harnesses: one module or folder for each kind of measurement, every one of which fills the same table."""
