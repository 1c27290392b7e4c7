"""Benchmarks: each module measures one thing and writes one JSON file; `benchmarks.report` reads them all."""
