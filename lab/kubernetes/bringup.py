"""The bring-up: everything of a lab started inside its sandbox, side by side."""

import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from lab import model
from lab.kubernetes import addons, certificates, components, image_store
from lab.kubernetes.addons import Bringup
from lab.kubernetes.addresses import HUB_PORT, NODE_IP
from lab.kubernetes.api import Api, ApiError, Obj, load
from lab.kubernetes.sandbox import ROOT, LabError, Sandbox

NAMESPACE = "llm"
PROMOTER = "vllm-promotion"  # the ServiceAccount that the pipeline runs with
TOKEN_SECONDS = 30 * 24 * 3600
# Deadlines for a machine that is much too busy; all of it takes 15 s on an idle one.
API_SECONDS = 180.0
COMMAND_SECONDS = 180.0
HUB_SECONDS = 180.0
CLUSTERS = {"simulator": "lab", "vllm": "lab-vllm"}  # by engine: the file in catalog/clusters
# The Pods that the others wait for come first.
IMAGES_FIRST = ("pause", "keda", "coredns", "prometheus-operator", "prometheus")


@dataclass(frozen=True)
class Parts:
    """What the set-up built: the folder with the programs, an OCI archive for each image (by its
    name after lab.local/), and the objects of KEDA and of prometheus-operator (Lists in JSON)."""

    programs: Path
    images: Mapping[str, Path]
    keda: Path
    monitoring: Path


class Abandoned(LabError):
    """Another part failed: the reason is that part's error."""


class Abort:
    """Tells the threads of the bring-up that one of them has failed."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._event = threading.Event()
        self._sandbox = sandbox

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raises Abandoned after `set`, LabError if a program has ended."""
        if self._event.is_set():
            raise Abandoned("another part of the lab failed")
        self._sandbox.check()


def bring_up(
    sandbox: Sandbox,
    node: components.Node,
    parts: Parts,
    *,
    engine: str,
    api_port: int,
    hub: str,
    ready: Callable[[str], None],
) -> None:
    """Starts everything and returns when all of it works, with `admin.kubeconfig` and
    `promoter.kubeconfig` in the state folder. `api_port` and `hub` (URL) are the relay's ends.
    Raises LabError with the part that failed and the end of its log."""
    state = node.state
    certificates.make_all(state / "pki")
    components.write_configuration(node)
    models = state / "models"
    models.mkdir()
    models.chmod(0o777)  # download and engine run as users of their own
    abort = Abort(sandbox)
    sandbox.spawn("etcd", components.etcd(node))
    sandbox.spawn("kube-apiserver", components.api_server(node))
    api = Api(api_port, state / "pki")
    with ThreadPoolExecutor(max_workers=16, thread_name_prefix="lab") as pool:
        images = Images(pool, sandbox, parts.images, abort, ready)
        platform = pool.submit(platform_objects, CLUSTERS[engine])
        hub_serves = pool.submit(serve_hub, sandbox, state / "hub", hub, abort, ready)
        up = Bringup(api, images.wait_for, abort.check, ready)
        try:
            wait_for_api(api, abort, ready)
            sandbox.spawn("kube-controller-manager", components.controller_manager(node))
            sandbox.spawn("kube-scheduler", components.scheduler(node))
            sandbox.spawn("kube-proxy", components.kube_proxy(node))
            images.wait_for_containerd()
            sandbox.spawn("kubelet", components.kubelet(node))
            sandbox.spawn("gpu-plugin", components.gpu_plugin(node))
            up.apply([addons.namespace(name) for name in ("monitoring", "lab")])
            work: list[Future[None]] = [
                pool.submit(addons.keda, up, items(parts.keda)),
                pool.submit(addons.prometheus, up, items(parts.monitoring)),
                pool.submit(addons.node, up, node.gpus),
                pool.submit(addons.dns, up),
                pool.submit(addons.hub, up),
                pool.submit(addons.storage, up, models),
                hub_serves,
                pool.submit(lambda: apply_platform(up, state, api_port, platform.result())),
                images.imported,
            ]
            first_error(work)
        except (OSError, http.client.HTTPException, ApiError) as error:
            abort.set()
            sandbox.check()  # a program that has ended is the better reason
            raise LabError(str(error) or repr(error)) from error
        except BaseException:
            abort.set()
            raise


def first_error(work: list[Future[None]]) -> None:
    """Returns when all is done; raises the first error at once."""
    done, _ = wait(work, return_when=FIRST_EXCEPTION)
    errors = [error for future in done if (error := future.exception()) is not None]
    # Whoever noticed that another part failed is not the one to quote.
    errors.sort(key=lambda error: isinstance(error, Abandoned))
    if errors:
        raise errors[0]


class Images:
    """Puts the images onto the node: those of the store at once, others imported in the order of
    need; says when one is there."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        sandbox: Sandbox,
        archives: Mapping[str, Path],
        abort: Abort,
        ready: Callable[[str], None],
    ) -> None:
        self._sandbox = sandbox
        self._abort = abort
        self._there = {name: threading.Event() for name in archives}
        self._containerd = threading.Event()
        self.imported: Future[None] = pool.submit(self._import, archives, ready)

    def wait_for(self, name: str) -> None:
        """Until the image is on the node. Raises LabError."""
        if name not in self._there:
            raise LabError(f"the image lab.local/{name} was not built: run `python -m lab build`")
        self._wait(self._there[name])

    def wait_for_containerd(self) -> None:
        """Until containerd answers. Raises LabError."""
        self._wait(self._containerd)

    def _wait(self, event: threading.Event) -> None:
        while not event.wait(0.1):
            if self.imported.done():
                self.imported.result()
            self._abort.check()

    def _import(self, archives: Mapping[str, Path], ready: Callable[[str], None]) -> None:
        kept = image_store.contents()
        if kept:
            image_store.link_into(self._sandbox.state)
        self._sandbox.spawn("containerd", components.containerd(self._sandbox.state))
        image_store.wait_for_containerd(self._sandbox, self._abort.check)
        self._containerd.set()
        ready("containerd")
        lacking = image_store.lacking(archives, kept)
        for name in archives.keys() - lacking.keys():
            self._there[name].set()
        first = [name for name in IMAGES_FIRST if name in lacking]
        for name in dict.fromkeys([*first, *lacking]):
            self._abort.check()
            image_store.import_image(self._sandbox, lacking[name])
            self._there[name].set()
        ready(f"{len(archives)} images on the node, {len(lacking)} of them newly imported")


def wait_for_api(api: Api, abort: Abort, ready: Callable[[str], None]) -> None:
    """Until the API server is ready to serve."""
    end = time.monotonic() + API_SECONDS
    while True:
        abort.check()
        try:
            if api.request("GET", "/readyz") == "ok":
                ready("API server")
                return
        except (LabError, OSError) as error:
            if time.monotonic() > end:
                raise LabError(f"the API server is not ready: {error}") from error
        time.sleep(0.05)


def serve_hub(
    sandbox: Sandbox, root: Path, url: str, abort: Abort, ready: Callable[[str], None]
) -> None:
    """The model hub with the lab's model, as a process of the node; returns when it answers."""
    try:
        model.publish(root, lambda _: None)
    except model.ModelError as error:
        raise LabError(str(error)) from error
    abort.check()
    argv = [sys.executable, "-m", "lab.hub", f"--root={root}"]
    listen = [f"--host={NODE_IP}", f"--port={HUB_PORT}"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    sandbox.spawn("hub", [*argv, *listen], environment)
    end = time.monotonic() + HUB_SECONDS
    while True:
        abort.check()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            break  # it speaks
        except OSError as error:
            if time.monotonic() > end:
                raise LabError(f"the model hub does not answer: {error}") from error
            time.sleep(0.1)
        else:
            break
    ready("model hub")


def items(file: Path) -> list[Obj]:
    """The objects of a List in JSON."""
    objects: list[Obj] = json.loads(file.read_text())["items"]
    return objects


def platform_objects(cluster: str) -> str:
    """The product's own objects for a cluster, as YAML, by the command that an operator would use:
    the lab imports nothing of the product."""
    argv = [sys.executable, "-m", "k8s", "platform", "--cluster", cluster]
    shown = f"`python {' '.join(argv[1:])}`"
    try:
        done = subprocess.run(
            argv, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shown} took more than {COMMAND_SECONDS:.0f} s") from error
    if done.returncode:
        raise LabError(f"{shown} failed:\n{done.stderr or done.stdout}")
    return done.stdout


def apply_platform(up: Bringup, state: Path, api_port: int, text: str) -> None:
    """Applies the platform's objects and writes the kubeconfigs of admin and pipeline."""
    pki = state / "pki"
    credentials = certificates.admin_credentials(pki)
    certificates.write_kubeconfig(
        state / "admin.kubeconfig", pki, "127.0.0.1", api_port, credentials, namespace=NAMESPACE
    )
    objects = load(text)
    up.apply([o for o in objects if o["kind"] == "Namespace"])
    up.apply([o for o in objects if o["kind"] != "Namespace"])
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{PROMOTER}/token"
    asked = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": TOKEN_SECONDS},
    }
    token = up.api.request("POST", account, asked)["status"]["token"]
    certificates.write_kubeconfig(
        state / "promoter.kubeconfig",
        pki,
        "127.0.0.1",
        api_port,
        {"token": token},
        namespace=NAMESPACE,
    )
    up.ready("platform objects")
