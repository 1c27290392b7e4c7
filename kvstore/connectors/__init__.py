"""Connectors: one readable file per engine, and beside them what all engines share. Nothing here imports an engine."""
