"""Rempart attacks, audits, hardens, explains and guards image classifiers."""

__version__ = "0.1.0"
