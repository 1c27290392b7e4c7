"""A durable server of S3 for tests: one node of Debian's Ceph, on loopback, without systemd, that can be killed.

A monitor, a store of objects on a sparse file, and the gateway that speaks S3. Install them with
`apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common` (some 265 MB).
"""

import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.s3_servers import ACCESS_KEY, SECRET_KEY, S3Server, free_port

_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "monmaptool", "ceph")
_READY_S = 60.0
_STORE_BYTES = 20 << 30
# Why what: without authentication, monitors must allow plain messages, or the gateway never gets in; a store that was
# killed must be declared dead, or its successor waits for it (`grace` keeps a slow one from being declared so by
# others); the gateway's cache makes the first request after a kill wait half a minute.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{monitor_port},v1:127.0.0.1:{old_monitor_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc secure
run_dir = {directory}
admin_socket =
log_file = {directory}/$name.log
mon_cluster_log_file = {directory}/cluster.log
crash_dir = {directory}/crash
keyring = {directory}/keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_data_avail_crit = 1
paxos_propose_interval = 0.05
osd_heartbeat_grace = 600
[mon]
mon_data = {directory}/mon
mon_pg_warn_min_per_osd = 0
[osd]
osd_data = {directory}/osd
osd_objectstore = bluestore
bluestore_block_size = {store_bytes}
bluestore_block_db_create = false
bluestore_block_wal_create = false
osd_memory_target = 1073741824
[client.rgw]
rgw_data = {directory}/rgw
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_enable_apis = s3
rgw_cache_enabled = false
rgw_gc_obj_min_wait = 60
rgw_gc_processor_period = 60
"""


class Ceph:
    """One node with its data in a directory; `start` after `kill` opens the same data again."""

    def __init__(self, directory: Path) -> None:
        missing = [program for program in _PROGRAMS if shutil.which(program) is None]
        assert not missing, f"{missing} are missing: see the head of {__file__}"
        self.port = free_port()
        self.kills = 0
        self._directory = directory
        self._configuration = directory / "ceph.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._made = False

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if not self._made:
            self._make_monitor()
        self._spawn("ceph-mon", "-i", "a")
        self._wait("ceph-mon", lambda: self._ceph("mon", "stat") is not None)
        if not self._made:
            identity = str(uuid.uuid4())
            self._run("ceph", "--connect-timeout", "10", "osd", "new", identity)
            self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        else:
            self._run("ceph", "--connect-timeout", "10", "osd", "down", "--definitely-dead", "0")
        self._spawn("ceph-osd", "-i", "0")
        self._wait("ceph-osd", lambda: "1 up" in (self._ceph("osd", "stat") or ""))
        if not self._made:
            self._make_user()
            self._made = True
        self._spawn("radosgw", "-n", "client.rgw")
        self._wait("radosgw", lambda: _accepts(self.port))

    def kill(self) -> None:
        """End all of it at once, as a power cut does."""
        self.kills += 1
        self.stop()

    def stop(self) -> None:
        """End every process."""
        for process in self._processes.values():
            process.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def _make_monitor(self) -> None:
        for folder in ("mon", "osd", "rgw", "crash"):
            (self._directory / folder).mkdir()
        (self._directory / "keyring").touch()
        monitor_port = free_port()
        old_monitor_port = free_port()
        fsid = str(uuid.uuid4())
        values = {"fsid": fsid, "monitor_port": monitor_port, "old_monitor_port": old_monitor_port, "port": self.port}
        text = _CONFIGURATION.format(directory=self._directory, store_bytes=_STORE_BYTES, **values)
        self._configuration.write_text(text)
        addresses = f"[v2:127.0.0.1:{monitor_port},v1:127.0.0.1:{old_monitor_port}]"
        map_file = str(self._directory / "monmap")
        self._run("monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, map_file, configured=False)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", map_file)

    def _make_user(self) -> None:
        keys = ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test", *keys)

    def _spawn(self, program: str, *arguments: str) -> None:
        with (self._directory / f"{program}.out").open("ab") as out:
            self._processes[program] = subprocess.Popen(
                [program, "-c", str(self._configuration), "-f", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def _run(self, program: str, *arguments: str, configured: bool = True) -> None:
        configuration = ["-c", str(self._configuration)] if configured else []
        done = subprocess.run([program, *configuration, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{program} {arguments}: {done.stderr}"

    def _ceph(self, *arguments: str) -> str | None:
        """What the monitor says, or None where it does not answer."""
        command = ["ceph", "-c", str(self._configuration), "--connect-timeout", "10", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr if done.returncode == 0 else None

    def _wait(self, program: str, ready: Callable[[], bool]) -> None:
        end_s = time.monotonic() + _READY_S
        while not ready():
            status = self._processes[program].poll()
            assert status is None, f"{program} ended with status {status}: see {self._directory}"
            assert time.monotonic() < end_s, f"{program} is not ready: see {self._directory}"
            time.sleep(0.05)


@contextmanager
def running_ceph(directory: Path) -> Iterator[tuple[Ceph, S3Server]]:
    """Ceph, and a bucket in it, until the block is left."""
    ceph = Ceph(directory)
    try:
        ceph.start()
        server = S3Server(f"http://127.0.0.1:{ceph.port}", "ceph")
        yield ceph, server
        server.client.close()
    finally:
        ceph.stop()


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
