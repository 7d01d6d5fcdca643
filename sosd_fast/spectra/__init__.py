"""Spectra of matrices: all singular values, the leading ones, their errors and bounds."""
