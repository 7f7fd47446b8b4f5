"""The real API server of the tests of k8s/."""

from tests.k8s.conftest import kubeconfig, own_server, server

__all__ = ["kubeconfig", "own_server", "server"]
