"""A model hub for the lab: it speaks the Hub's HTTP protocol and serves faults on demand."""

from lab.hub.faults import Fault
from lab.hub.server import HubServer
from lab.hub.store import Hub

__all__ = ["Fault", "Hub", "HubServer"]
