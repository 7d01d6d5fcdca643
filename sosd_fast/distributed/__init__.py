"""Spectra of weights that several ranks hold."""
