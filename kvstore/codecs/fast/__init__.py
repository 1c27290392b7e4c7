"""Hot loops of the CPU path, compiled by numba; each equals its namesake in `ref/` bit for bit."""
