"""An S3 object store of the tests: a SeaweedFS server on loopback, found through the environment alone."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from pyarrow import fs

BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def store_environment(tmp_path_factory):
    """A server with a bucket ``lake``, for all tests of a run; the variables by which it is found."""
    folder = tmp_path_factory.mktemp("store")
    credentials = [{"accessKey": "key", "secretKey": "secret"}]
    access = {"identities": [{"name": "test", "credentials": credentials, "actions": ["Admin"]}]}
    (folder / "access.json").write_text(json.dumps(access))
    ports = {name: _port() for part in ("master", "volume", "filer", "s3") for name in (part, f"{part}.grpc")}
    flags = [f"-{name.replace('.', '.port.') if '.' in name else f'{name}.port'}={n}" for name, n in ports.items()]
    flags += [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-s3.port.iceberg=0"]
    # Of eight volumes, which it has by default, seven go to no bucket: 64 MB would be all.
    flags += ["-master.volumeSizeLimitMB=64", "-volume.max=64"]
    flags += ["-s3.port.lance=0", f"-s3.config={folder / 'access.json'}"]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with (
        open(folder / "log", "wb") as log,
        subprocess.Popen([BIN / "weed", "server", *flags], cwd=folder, stdout=log, stderr=log) as server,
    ):
        try:
            with pytest.MonkeyPatch.context() as patch:
                set_all(patch, environment)
                _create(_filesystem(environment), "lake", server)
            yield environment
        finally:
            server.kill()
            for socket in (socket for port in ports.values() for socket in _sockets(port)):
                socket.unlink(missing_ok=True)


def _port() -> int:
    """A free port, whose name among the server's sockets is free, too: it cannot remove what another user has left."""
    return next(port for port in iter(free_port, None) if not _sockets(port))


def _sockets(port: int) -> list[Path]:
    return list(Path("/tmp").glob(f"seaweedfs-*-{port}.sock"))


@pytest.fixture(scope="module")
def store(store_environment):
    """The store, which the environment names while a module's tests run: pyarrow's file system for it."""
    with pytest.MonkeyPatch.context() as patch:
        set_all(patch, store_environment)
        yield _filesystem(store_environment)


def _filesystem(environment):
    return fs.S3FileSystem(endpoint_override=environment["AWS_ENDPOINT_URL"], allow_bucket_creation=True)


def set_all(patch, environment):
    """Set variables."""
    for name, value in environment.items():
        patch.setenv(name, value)


def _create(filesystem, bucket, server):
    """As soon as the server is up; not when it has ended, nor after five minutes."""
    for _ in range(1500):
        try:
            return filesystem.create_dir(bucket)
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.2)
    raise RuntimeError(f"weed server did not start: {server.args}")


def refuse_like_a_mounted_store(patch):
    """Have the operating system refuse what such a mount does: append, reading and writing at once, links, renaming."""
    opened = os.open

    def refuse(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    def may_open(path, flags, *more, **given):
        return refuse() if flags & (os.O_RDWR | os.O_APPEND) else opened(path, flags, *more, **given)

    patch.setattr(os, "open", may_open)
    for name in ("link", "rename", "replace"):
        patch.setattr(os, name, refuse)
