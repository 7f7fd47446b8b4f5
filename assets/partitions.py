"""The partitions: one a model of the catalog."""

import sys

import dagster as dg

from catalog import CatalogError
from catalog.load import catalog


def _models() -> list[str]:
    try:
        return list(catalog().models)
    except CatalogError:
        # Its message names file, line and field; a stack of our own frames would bury it.
        sys.tracebacklimit = 0
        raise


MODELS = dg.StaticPartitionsDefinition(_models())
