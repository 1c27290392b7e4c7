"""Triton twins of what runs on the decode path; one source for a GPU and for the interpreter. Needs triton."""
