"""Certificates, keys and kubeconfigs of the lab's cluster: made at each start, dead with it."""

import base64
import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.kubernetes.addresses import API_PORT, DOMAIN, KUBERNETES_IP, NODE, NODE_IP

VALID_DAYS = 365
API_NAMES = (
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    f"kubernetes.default.svc.{DOMAIN}",
    "localhost",
    "127.0.0.1",
    KUBERNETES_IP,
    NODE_IP,
)

# Who talks to the API server: kubeconfig name, user, group.
CLIENTS = (
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    ("kubelet", f"system:node:{NODE}", "system:nodes"),
    ("kube-proxy", "system:kube-proxy", None),
)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        return _key_pem(self.key)


def make_all(folder: Path) -> None:
    """Writes both authorities, all certificates, the ServiceAccount key and the kubeconfigs."""
    folder.mkdir(mode=0o700)
    authority = _authority("vllm-promotion-lab")
    front = _authority("vllm-promotion-lab-front-proxy")
    _write_pair(folder, "ca", authority)
    _write_pair(folder, "front-proxy-ca", front)
    _write_pair(folder, "apiserver", _issue(authority, "kube-apiserver", None, API_NAMES))
    _write_pair(folder, "front-proxy-client", _issue(front, "front-proxy-client", None))
    to_kubelet = _issue(authority, "kube-apiserver-kubelet-client", "system:masters")
    _write_pair(folder, "apiserver-kubelet-client", to_kubelet)
    names = (NODE, NODE_IP, "127.0.0.1")
    serving = _issue(authority, f"system:node:{NODE}", "system:nodes", names)
    _write_pair(folder, "kubelet-server", serving)
    for file, user, group in CLIENTS:
        pair = _issue(authority, user, group)
        _write_pair(folder, file, pair)
        credentials = {
            "client-certificate-data": _base64(pair.certificate_pem()),
            "client-key-data": _base64(pair.key_pem()),
        }
        write_kubeconfig(folder / f"{file}.kubeconfig", folder, NODE_IP, API_PORT, credentials)
    accounts = ec.generate_private_key(ec.SECP256R1())
    _write(folder / "sa.key", _key_pem(accounts))
    public = accounts.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write(folder / "sa.pub", public)


def write_kubeconfig(
    file: Path,
    folder: Path,
    host: str,
    port: int,
    credentials: dict[str, str],
    *,
    name: str = "lab",
    namespace: str = "default",
) -> None:
    """Writes a kubeconfig with everything embedded; `folder` holds the authority's certificate."""
    authority = _base64((folder / "ca.crt").read_bytes())
    cluster = {"server": f"https://{host}:{port}", "certificate-authority-data": authority}
    context = {"cluster": name, "user": name, "namespace": namespace}
    config: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": credentials}],
        "contexts": [{"name": name, "context": context}],
    }
    _write(file, yaml.safe_dump(config).encode())


def admin_credentials(folder: Path) -> dict[str, str]:
    """The admin's entry of a kubeconfig."""
    return {
        "client-certificate-data": _base64((folder / "admin.crt").read_bytes()),
        "client-key-data": _base64((folder / "admin.key").read_bytes()),
    }


def for_service(*names: str) -> dict[str, str]:
    """An authority and one serving and client certificate for these DNS names, as PEM: keys ca.crt,
    tls.crt and tls.key, as in a Secret."""
    authority = _authority(f"vllm-promotion-lab-{names[0]}")
    pair = _issue(authority, names[0], None, names)
    return {
        "ca.crt": authority.certificate_pem().decode(),
        "tls.crt": pair.certificate_pem().decode(),
        "tls.key": pair.key_pem().decode(),
    }


def _name(common: str, group: str | None) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if group:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, group))
    return x509.Name(parts)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _authority(common: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(common, None)
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    subject_key = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(subject_key, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate, key)


def _issue(authority: Pair, user: str, group: str | None, names: tuple[str, ...] = ()) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # With the authority's key named, strict verifiers (Python 3.13 and newer) accept the chain.
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = (
        _builder(_name(user, group), authority.certificate.subject, key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(by, critical=False)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([_general(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
    return Pair(builder.sign(authority.key, hashes.SHA256()), key)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_pair(folder: Path, name: str, pair: Pair) -> None:
    _write(folder / f"{name}.crt", pair.certificate_pem())
    _write(folder / f"{name}.key", pair.key_pem())


def _write(file: Path, content: bytes) -> None:
    """Readable by the owner alone from its first byte on."""
    with os.fdopen(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as out:
        out.write(content)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
