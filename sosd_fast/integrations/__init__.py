"""Callbacks and writers for the tools that people train and log with."""
