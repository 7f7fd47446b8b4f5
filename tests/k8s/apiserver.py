"""A bare Kubernetes API for tests: etcd, API server and a few controllers on loopback.

No node, no scheduler. Real programs, real sockets, up in a few seconds.
"""

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

ADMIN_TOKEN = "admin-token-of-a-test"
NOBODY_TOKEN = "nobody-token-of-a-test"  # authenticated, with no permission
CONTROLLERS = (
    "job-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "deployment-controller",
    "replicaset-controller",
    "resourcequota-controller",
)
_START_S = 60
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ApiServer:
    """`address` (https), `authority`: its certificate file, `tokens`: the file it reads."""

    address: str
    authority: Path
    folder: Path

    def kubeconfig(self, path: Path, token: str = ADMIN_TOKEN, server: str | None = None) -> Path:
        """Write a kubeconfig for one of the tokens; `server`: a proxy before the API server."""
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "clusters": [
                        {
                            "name": "test",
                            "cluster": {
                                "server": server or self.address,
                                "certificate-authority": str(self.authority),
                            },
                        }
                    ],
                    "users": [{"name": "test", "user": {"token": token}}],
                }
            )
        )
        return path


def find_programs() -> Path | None:
    """The folder with etcd, kube-apiserver and kube-controller-manager that the lab built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-promotion-lab"
    wanted = ("etcd", "kube-apiserver", "kube-controller-manager")
    found = {path.parent for path in cache.glob("*/kube-apiserver")}
    found |= {path.parent for path in cache.glob("*/*/bin/kube-apiserver")}
    whole = [folder for folder in found if all((folder / name).exists() for name in wanted)]
    return max(whole, key=lambda folder: folder.stat().st_mtime, default=None)


@contextlib.contextmanager
def start(programs: Path, folder: Path) -> Iterator[ApiServer]:
    """Run the programs until the block ends. Logs lie in `folder`."""
    etcd, etcd_peer, secure = free_port(), free_port(), free_port()
    _keys(folder)
    (folder / "tokens.csv").write_text(
        f'{ADMIN_TOKEN},admin,1,"system:masters"\n{NOBODY_TOKEN},nobody,2,"nobodies"\n'
    )
    server = ApiServer(f"https://127.0.0.1:{secure}", folder / "apiserver.crt", folder)
    running: list[subprocess.Popen[bytes]] = []

    def run(*argv: str) -> None:
        log = (folder / f"{Path(argv[0]).name}.log").open("wb")
        running.append(
            subprocess.Popen(
                argv,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                preexec_fn=_die_with_parent,
            )
        )

    try:
        run(
            str(programs / "etcd"),
            f"--data-dir={folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{etcd_peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )
        run(
            str(programs / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={secure}",
            f"--cert-dir={folder}",  # it makes its own certificate there
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--allow-privileged=true",
            "--service-cluster-ip-range=10.125.0.0/24",
            f"--service-account-key-file={folder / 'sa.pub'}",
            f"--service-account-signing-key-file={folder / 'sa.key'}",
            "--service-account-issuer=https://test",
            "--kubelet-preferred-address-types=InternalIP",
            "--disable-admission-plugins=ServiceAccount",
            "--profiling=false",
        )
        _wait_ready(server, running)
        run(
            str(programs / "kube-controller-manager"),
            f"--kubeconfig={server.kubeconfig(folder / 'controllers.kubeconfig')}",
            f"--controllers={','.join(CONTROLLERS)}",
            "--leader-elect=false",
            f"--secure-port={free_port()}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={folder / 'controllers'}",
        )
        yield server
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGKILL)
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _keys(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = serialization.Encoding.PEM
    (folder / "sa.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (folder / "sa.pub").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _wait_ready(server: ApiServer, running: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_S
    why = "no answer"
    while time.monotonic() < deadline:
        ended = [process for process in running if process.poll() is not None]
        if ended:
            logs = [Path(str(process.args[0])).name + ".log" for process in ended]  # type: ignore[index]
            tails = [(server.folder / log).read_text()[-2000:] for log in logs]
            raise RuntimeError(f"the test's API server didn't start: {logs}\n" + "\n".join(tails))
        try:
            context = ssl.create_default_context(cafile=str(server.authority))
            request = urllib.request.Request(
                server.address + "/readyz", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}
            )
            with urllib.request.urlopen(request, context=context, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError) as error:
            why = str(error)
        time.sleep(0.1)
    raise RuntimeError(f"the test's API server isn't ready after {_START_S} s: {why}")


def free_port() -> int:
    """A loopback port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
