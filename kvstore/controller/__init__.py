"""The controller: which profile, and how many of its levels, a transfer uses."""
