"""Every figure of the project in one style, from tables, arrays and spectra."""
