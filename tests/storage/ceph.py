"""Ceph in three processes, for the heavy tests: a monitor, one disk in a file, and the S3 gateway."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from dscheck.testing.servers import KEY, SECRET, S3Server, find_program

_CONFIG = """\
[global]
fsid={fsid}
mon host=v2:127.0.0.1:{port}/0
public addr=127.0.0.1
auth cluster required=none
auth service required=none
auth client required=none
osd pool default size=1
osd pool default min size=1
osd pool default pg num=8
osd pool default pg autoscale mode=off
mon allow pool size one=true
mon warn on pool no redundancy=false
osd crush chooseleaf type=0
run dir={folder}/run
admin socket={folder}/run/$cluster-$name.asok
log file={folder}/log/$name.log
mon data={folder}/mon
osd data={folder}/osd
keyring={folder}/keyring
osd objectstore=bluestore
bluestore block size=10737418240
bluestore block create=true
osd memory target=1073741824
mon_data_avail_crit=1
paxos propose interval=0.02
paxos min wait=0.01
rgw thread pool size=64
rgw gc obj min wait=5
rgw gc processor period=10
rgw gc processor max time=10
[client.rgw.a]
rgw frontends=beast endpoint=127.0.0.1:{gateway}
ms mon client mode=crc
"""
_STEP_S = 60.0


class Ceph(S3Server):
    """`kill` and `start` are the gateway's; the cluster ends with the context. `folder` is absolute."""

    program = "radosgw"
    conditional = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._config = folder / "ceph.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def _ports() -> int:
        return 2

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The gateway first: without its cluster it lingers.
        super().__exit__(kind, error, trace)
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def _prepare(self) -> None:
        folder, (gateway, port), fsid, disk = self.folder, self.ports, uuid.uuid4(), str(uuid.uuid4())
        for name in ("mon", "osd", "run", "log"):
            (folder / name).mkdir()
        self._config.write_text(_CONFIG.format(fsid=fsid, port=port, gateway=gateway, folder=folder))
        self._do("ceph-authtool", "--create-keyring", "keyring", "--gen-key", "-n", "client.rgw.a")
        self._do("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{port}]", "--fsid", str(fsid), "monmap")
        self._do("ceph-mon", "-c", "ceph.conf", "--mkfs", "-i", "a", "--monmap", "monmap")
        self._run_on("ceph-mon", "-i", "a")
        self._do("ceph", "-c", "ceph.conf", "osd", "new", disk)
        self._do("ceph-osd", "-c", "ceph.conf", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._run_on("ceph-osd", "-i", "0")
        user = ("--uid=t", "--display-name=t", f"--access-key={KEY}", f"--secret={SECRET}")
        self._do("radosgw-admin", "-c", "ceph.conf", "user", "create", *user)

    def _command(self) -> Sequence[str]:
        return ["-c", "ceph.conf", "-n", "client.rgw.a", "-f"]

    def _do(self, program: str, *arguments: str) -> None:
        command = [find_program(program), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, timeout=_STEP_S)

    def _run_on(self, program: str, *arguments: str) -> None:
        self._daemons.append(self.spawn([find_program(program), "-c", "ceph.conf", *arguments, "-f"]))
