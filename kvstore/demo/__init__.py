"""`kvstore demo`: a real model's KV cache stored by one process, fetched and reused by another."""

from kvstore.demo.main import run_demo

__all__ = ["run_demo"]
