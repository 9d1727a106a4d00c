"""Detectors: how an attack is noticed."""
