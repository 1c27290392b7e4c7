"""A link of a chosen rate between two network namespaces, shaped in both directions by the kernel.

It takes root, `ip` and `tc`. What is made is removed when the block ends; the names carry this process's id, so that
two runs do not meet.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.servers import running

STORE_ADDRESS = "10.77.0.1"
"""Where the stores listen."""

ENGINE_ADDRESS = "10.77.0.2"

FREE_GBIT_PER_S = 40.0
"""More than a pair of virtual interfaces carries here: not shaped."""

_CLONE_NEWNET = 0x40000000
_MTU = 9000
_QUIET_S = 0.02
_COUNTERS = "cat /sys/class/net/engine/statistics/rx_bytes /sys/class/net/engine/statistics/tx_bytes"


_SENDER = """\
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    with server.accept()[0] as connection:
        connection.sendall(bytes(int(sys.argv[2])))
"""


class Link:
    """Two namespaces and the pair of interfaces between them.

    Args:
        name: Prefix of the namespaces' names.
    """

    def __init__(self, name: str) -> None:
        self._store, self._engine = f"{name}s", f"{name}e"
        self._sides = ((self._store, "store", STORE_ADDRESS), (self._engine, "engine", ENGINE_ADDRESS))
        self._counter: subprocess.Popen[str] | None = None

    @property
    def store_side(self) -> list[str]:
        """What a store's command begins with."""
        return ["ip", "netns", "exec", self._store]

    @property
    def engine_side(self) -> list[str]:
        """What an engine's command begins with."""
        return ["ip", "netns", "exec", self._engine]

    @contextmanager
    def made(self) -> Iterator[None]:
        """It is there, not shaped, for as long as the block runs."""
        try:
            self._make()
            counters = [*self.engine_side, "sh", "-c", f"while read _; do {_COUNTERS}; done"]
            with running(counters, stdin=subprocess.PIPE) as self._counter:
                yield
        finally:
            for namespace, _, _ in self._sides:
                if Path("/run/netns", namespace).exists():
                    _run("ip", "netns", "del", namespace)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and those that it starts, are on the engines' side for as long as the block runs."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self._engine}", os.O_RDONLY)
        try:
            _set_namespace(there)
            yield
        finally:
            _set_namespace(home)
            os.close(home)
            os.close(there)

    def measured_gbit_per_s(self, size_bytes: int) -> float:
        """What a plain TCP connection gets through to the engines' side, on which the caller is."""
        command = [*self.store_side, sys.executable, "-c", _SENDER, STORE_ADDRESS, str(size_bytes)]
        with running(command) as sender:
            assert sender.stdout is not None, "`running` pipes it"
            with socket.create_connection((STORE_ADDRESS, int(sender.stdout.readline()))) as connection:
                # What is in the bucket when it begins came at no cost.
                left = size_bytes - len(connection.recv(1 << 20))
                started_s, counted = time.monotonic(), left
                while left and (got := len(connection.recv(1 << 20))):
                    left -= got
                return 8e-9 * (counted - left) / (time.monotonic() - started_s)

    def shape(self, gbit_per_s: float) -> None:
        """Set the rate of both directions; what is on its way stays there."""
        for namespace, interface, _ in self._sides:
            self._shape("change", namespace, interface, gbit_per_s)

    def received_bytes(self) -> int:
        """Bytes that the engines' side has received so far, headers included."""
        return self._moved()[0]

    def settle(self) -> None:
        """Wait until nothing moves."""
        before = None
        while (moved := self._moved()) != before:
            before = moved
            time.sleep(_QUIET_S)

    def _make(self) -> None:
        for namespace, _, _ in self._sides:
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        ends = ["store", "netns", self._store, "type", "veth", "peer", "name", "engine", "netns", self._engine]
        _run("ip", "link", "add", *ends)
        for namespace, interface, address in self._sides:
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
            _run("ip", "-n", namespace, "link", "set", interface, "mtu", str(_MTU), "up")
            _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", "handle", "1:", "htb", "default", "1")
            self._shape("add", namespace, interface, FREE_GBIT_PER_S)

    def _shape(self, verb: str, namespace: str, interface: str, gbit_per_s: float) -> None:
        # Bursts of about 2 ms: shorter ones keep the kernel from reaching the rate, longer ones hide a slow link.
        rate, burst = f"{gbit_per_s * 1000:g}mbit", f"{max(64, int(gbit_per_s * 250))}kb"
        limits = ["rate", rate, "ceil", rate, "burst", burst, "cburst", burst, "quantum", "60000"]
        where = ["class", verb, "dev", interface, "parent", "1:", "classid", "1:1", "htb"]
        _run("tc", "-n", namespace, *where, *limits)

    def _moved(self) -> tuple[int, int]:
        """Bytes received and sent by the engines' side."""
        assert self._counter is not None
        assert self._counter.stdin is not None
        assert self._counter.stdout is not None
        self._counter.stdin.write("\n")
        self._counter.stdin.flush()
        return int(self._counter.stdout.readline()), int(self._counter.stdout.readline())


@contextmanager
def shaped_link() -> Iterator[Link]:
    """A link for as long as the block runs."""
    link = Link(f"kvs{os.getpid()}")
    with link.made():
        yield link


def missing() -> str | None:
    """What a link cannot be made without; None where nothing is missing."""
    absent = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if absent:
        return f"{' and '.join(absent)} (package iproute2)"
    return None if os.geteuid() == 0 else "root, for network namespaces"


def _set_namespace(descriptor: int) -> None:
    """`os.setns`, which Python has from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
