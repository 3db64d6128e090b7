"""Exports: what was trained, as other programs open it."""
