"""The programs of a one-node Kubernetes: their configuration files and command lines.

Each function returns the argv of one component; `write_configuration` writes what they read.
Health and other listening addresses stay at their defaults: the sandbox has a network of its own.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lab.kubernetes.addresses import (
    API_PORT,
    DNS_IP,
    DOMAIN,
    ETCD_PORT,
    NODE,
    NODE_IP,
    PODS,
    SERVICES,
)
from lab.kubernetes.sandbox import LabError

HERE = Path(__file__).parent
HPA_SYNC_SECONDS = 5  # Kubernetes' default is 15: a demo would wait for it
GPU_PRODUCT = "NVIDIA-L4-SIMULATED"
GPU_MEMORY_MIB = 23034  # of an L4


@dataclass(frozen=True)
class Node:
    """What the components need to know: the lab's state folder, the folder with the programs, the
    cgroup, and how many GPUs to simulate."""

    state: Path
    programs: Path
    cgroup: str
    gpus: int
    mounts: tuple[tuple[str, str], ...] = ()  # (folder of the machine, in each Pod with a GPU)

    def pki(self, name: str) -> str:
        return str(self.state / "pki" / name)

    def program(self, name: str) -> str:
        return str(self.programs / name)


def write_configuration(node: Node) -> None:
    """Writes every configuration file. Raises LabError if runc or the CNI plugins are missing."""
    write_containerd_configuration(node.state)
    folder = node.state / "etc"
    (node.state / "cni").mkdir()
    (node.state / "cni" / "10-lab.conflist").write_text(json.dumps(_cni()))
    (folder / "resolv.conf").write_text("")  # Pods with dnsPolicy Default: nothing to resolve there
    (folder / "kubelet.yaml").write_text(yaml.safe_dump(_kubelet(node)))
    (folder / "kube-proxy.yaml").write_text(yaml.safe_dump(_kube_proxy(node)))
    gpu = node.state / "gpu"
    gpu.mkdir()
    shutil.copy(HERE / "nvidia-smi", gpu / "nvidia-smi")
    (gpu / "nvidia-smi").chmod(0o755)


def write_containerd_configuration(state: Path) -> None:
    """Writes containerd's alone. Raises LabError if runc or the CNI plugins are missing."""
    (state / "etc").mkdir()
    text = (HERE / "containerd.toml").read_text()
    for key, value in {"runc": _find_runc(), "cni": _find_cni(), "state": str(state)}.items():
        text = text.replace("{" + key + "}", value)
    (state / "etc" / "containerd.toml").write_text(text)


def etcd(node: Node) -> list[str]:
    url = f"http://127.0.0.1:{ETCD_PORT}"
    return [
        node.program("etcd"),
        "--data-dir=/run/etcd",  # in memory, and dead with the lab
        f"--listen-client-urls={url}",
        f"--advertise-client-urls={url}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def api_server(node: Node) -> list[str]:
    pki = node.pki
    return [
        node.program("kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{ETCD_PORT}",
        f"--advertise-address={NODE_IP}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICES}",
        "--allow-privileged=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--client-ca-file={pki('ca.crt')}",
        f"--tls-cert-file={pki('apiserver.crt')}",
        f"--tls-private-key-file={pki('apiserver.key')}",
        f"--kubelet-client-certificate={pki('apiserver-kubelet-client.crt')}",
        f"--kubelet-client-key={pki('apiserver-kubelet-client.key')}",
        f"--kubelet-certificate-authority={pki('ca.crt')}",
        "--kubelet-preferred-address-types=InternalIP",
        f"--service-account-key-file={pki('sa.pub')}",
        f"--service-account-signing-key-file={pki('sa.key')}",
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--requestheader-client-ca-file={pki('front-proxy-ca.crt')}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={pki('front-proxy-client.crt')}",
        f"--proxy-client-key-file={pki('front-proxy-client.key')}",
        # KEDA's metrics server is asked at its Pod's address: one thing less to wait for.
        "--enable-aggregator-routing=true",
        "--profiling=false",
    ]


def controller_manager(node: Node) -> list[str]:
    pki = node.pki
    return [
        node.program("kube-controller-manager"),
        *_identity(node, "controller-manager"),
        f"--service-account-private-key-file={pki('sa.key')}",
        f"--root-ca-file={pki('ca.crt')}",
        f"--cluster-signing-cert-file={pki('ca.crt')}",
        f"--cluster-signing-key-file={pki('ca.key')}",
        f"--client-ca-file={pki('ca.crt')}",
        f"--requestheader-client-ca-file={pki('front-proxy-ca.crt')}",
        "--use-service-account-credentials=true",
        "--allocate-node-cidrs=false",
        f"--horizontal-pod-autoscaler-sync-period={HPA_SYNC_SECONDS}s",
    ]


def scheduler(node: Node) -> list[str]:
    return [node.program("kube-scheduler"), *_identity(node, "scheduler")]


def containerd(state: Path) -> list[str]:
    return ["containerd", "-c", str(state / "etc" / "containerd.toml"), "--log-level", "warn"]


def kubelet(node: Node) -> list[str]:
    # What NVIDIA's GPU Feature Discovery writes, with a product that says what it is.
    labels = {
        "nvidia.com/gpu.present": "true",
        "nvidia.com/gpu.product": GPU_PRODUCT,
        "nvidia.com/gpu.count": node.gpus,
        "nvidia.com/gpu.memory": GPU_MEMORY_MIB,
        "nvidia.com/gpu.replicas": 1,
        "nvidia.com/gpu.sharing-strategy": "none",
        "vllm-promotion.io/gpu": "simulated",
    }
    return [
        node.program("kubelet"),
        f"--config={node.state / 'etc' / 'kubelet.yaml'}",
        f"--kubeconfig={node.pki('kubelet.kubeconfig')}",
        f"--hostname-override={NODE}",
        f"--node-ip={NODE_IP}",
        "--node-labels=" + ",".join(f"{key}={value}" for key, value in labels.items()),
    ]


def kube_proxy(node: Node) -> list[str]:
    return [node.program("kube-proxy"), f"--config={node.state / 'etc' / 'kube-proxy.yaml'}"]


def gpu_plugin(node: Node) -> list[str]:
    return [
        node.program("gpu-plugin"),
        f"-n={node.gpus}",
        f"-nvidia-smi={node.state / 'gpu' / 'nvidia-smi'}",
        f"-unhealthy={node.state / 'gpu' / 'unhealthy'}",
        *(f"-mount={host}:{inside}" for host, inside in node.mounts),
    ]


def _identity(node: Node, name: str) -> list[str]:
    config = node.pki(f"{name}.kubeconfig")
    flags = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return [*(f"--{flag}={config}" for flag in flags), "--leader-elect=false"]


def _kubelet(node: Node) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": node.pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": node.pki("kubelet-server.crt"),
        "tlsPrivateKeyFile": node.pki("kubelet-server.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{node.cgroup}",
        "clusterDNS": [DNS_IP],
        "clusterDomain": DOMAIN,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "resolvConf": str(node.state / "etc" / "resolv.conf"),
        "failSwapOn": False,
        "failCgroupV1": False,  # machines that still have it must do
        # The machine's disk and memory are not the lab's: no eviction because of its neighbours.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        # How fast new GPUs show on the node; written no more often than that unless it changed.
        "nodeStatusUpdateFrequency": "2s",
        "nodeStatusReportFrequency": "30s",
        "syncFrequency": "5s",  # mounted ConfigMaps would lag a minute
        "maxPods": 80,
    }


def _kube_proxy(node: Node) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": node.pki("kube-proxy.kubeconfig")},
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        # Zeros: leave the machine's connection tracking limits alone.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "nftables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
    }


def _cni() -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni-addresses",
        "ranges": [[{"subnet": PODS}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def _find_runc() -> str:
    path = shutil.which("runc", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
    if path is None:
        raise LabError("runc is not installed: run `python -m lab build`")
    return path


def _find_cni() -> str:
    for folder in ("/usr/lib/cni", "/opt/cni/bin"):
        if (Path(folder) / "ptp").exists():
            return folder
    raise LabError("the CNI plugins are not installed: run `python -m lab build`")
