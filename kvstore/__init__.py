"""kvstore: an adaptive storage tier for the KV caches of large language models."""

__version__ = "0.1.0"
