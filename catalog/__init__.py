"""What can be promoted, and where to: typed, frozen specs loaded from YAML."""

from catalog.cluster import ClusterSpec, NodePool, PoolError
from catalog.load import Catalog, CatalogError, load_catalog
from catalog.model import ModelSpec

__all__ = [
    "Catalog",
    "CatalogError",
    "ClusterSpec",
    "ModelSpec",
    "NodePool",
    "PoolError",
    "load_catalog",
]
