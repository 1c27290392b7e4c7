"""What tests of kvstore and of its backends share: the conformance suite, frames without torch, failing backends.

Install `kvstore[testing]`. A backend proves itself by inheriting `BackendSuite` and saying how it is opened.
"""

from kvstore.testing.backend_suite import BackendSuite
from kvstore.testing.faults import FaultyBackend
from kvstore.testing.frames import make_frame, make_key

__all__ = ["BackendSuite", "FaultyBackend", "make_frame", "make_key"]
