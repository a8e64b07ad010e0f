"""Builds the suite's models byte by byte from SPEC.md. Imports nothing of the implementations it tests."""
