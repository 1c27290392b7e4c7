"""Tests of kvstore."""
