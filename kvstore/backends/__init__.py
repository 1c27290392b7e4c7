"""Backends that hold frames themselves: host memory, LMDB."""
