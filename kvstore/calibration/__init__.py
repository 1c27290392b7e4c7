"""Calibration: from a model and some text to an artefact, and the cache of a Hugging Face model as planes."""
