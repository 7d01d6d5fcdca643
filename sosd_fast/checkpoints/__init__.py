"""Saved weights: reading their files, measuring what they hold."""
