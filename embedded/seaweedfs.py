"""SeaweedFS, the S3 server, as one process."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from embedded.config import HOST, PlatformError, Ports, port_variable, write_private
from embedded.processes import Service

PORTS = (
    "s3",
    "s3_grpc",
    "seaweedfs_master",
    "seaweedfs_master_grpc",
    "seaweedfs_volume",
    "seaweedfs_volume_grpc",
    "seaweedfs_filer",
    "seaweedfs_filer_grpc",
    "seaweedfs_admin",
    "seaweedfs_admin_grpc",
)
_SOCKETS = Path("/tmp")


@dataclass(frozen=True, slots=True)
class SeaweedServer:
    """One server with its data in `folder` and its Unix sockets in `sockets`."""

    folder: Path
    sockets: Path
    ports: Ports
    access_key_id: str
    secret_access_key: str = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.ports.s3}"


def seaweedfs_service(server: SeaweedServer) -> Service:
    """The service; writes the file with the one identity that may use the S3 port."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        raise PlatformError("SeaweedFS is not installed: run `make setup`")
    server.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    identities = server.folder / "identities.json"
    key = {"accessKey": server.access_key_id, "secretKey": server.secret_access_key}
    identity = {"name": "platform", "credentials": [key], "actions": ["Admin"]}
    write_private(identities, json.dumps({"identities": [identity]}))
    return Service(
        name="seaweedfs",
        command=(str(program), "-logtostderr=true", "mini", *_options(server, identities)),
        environment={
            "PATH": os.defpath,
            "HOME": str(server.folder),
            # Go hands memory back to the system beyond this; it is not a hard limit.
            "GOMEMLIMIT": "300MiB",
        },
        ports=PORTS,
        directory=server.folder,
    )


def _options(server: SeaweedServer, identities: Path) -> list[str]:
    ports = server.ports
    return [
        f"-dir={server.folder}",
        # Master and filer answer without credentials, so nothing may listen beyond loopback.
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-master.telemetry=false",
        # Every bucket takes volumes of its own; the automatic limit stops at some fifty buckets.
        "-volume.max=2000",
        f"-s3.config={identities}",
        "-s3.autoCreateBucket=false",
        f"-s3.localSocket={server.sockets / 's3.sock'}",
        f"-filer.localSocket={server.sockets / 'filer.sock'}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.port={ports.s3}",
        f"-s3.port.grpc={ports.s3_grpc}",
        f"-master.port={ports.seaweedfs_master}",
        f"-master.port.grpc={ports.seaweedfs_master_grpc}",
        f"-volume.port={ports.seaweedfs_volume}",
        f"-volume.port.grpc={ports.seaweedfs_volume_grpc}",
        f"-filer.port={ports.seaweedfs_filer}",
        f"-filer.port.grpc={ports.seaweedfs_filer_grpc}",
        f"-admin.port={ports.seaweedfs_admin}",
        f"-admin.port.grpc={ports.seaweedfs_admin_grpc}",
    ]


def check_sockets(server: SeaweedServer) -> None:
    """Raise `PlatformError` for a socket in the way that this user cannot replace.

    The components of the server meet at fixed paths, which a killed server leaves behind.
    """
    for name in PORTS:
        if not name.endswith("_grpc"):
            continue
        component = name.removeprefix("seaweedfs_").removesuffix("_grpc")
        socket = _SOCKETS / f"seaweedfs-{component}-grpc-{getattr(server.ports, name)}.sock"
        if socket.exists() and os.geteuid() not in (0, socket.stat().st_uid):
            raise PlatformError(
                f"{socket} belongs to another user: delete it, "
                f"or set {port_variable(name)} to another port",
                reason="SOCKET_TAKEN",
            )


def answers(server: SeaweedServer) -> bool:
    try:
        response = httpx.get(f"{server.url}/healthz", timeout=2, trust_env=False)
    except httpx.TransportError:
        return False
    return response.status_code == 200
