"""How the stages of one run hand their values on: JSON files in the run's report folder.

A value belongs to its run. A stage that is started without the stages before it finds none, so
it can't go on from what an earlier promotion found out.
"""

from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import PrivateAttr, TypeAdapter

from assets.stage import PromotionFailed


class RunValues(dg.ConfigurableIOManager):
    """Dataclasses and pydantic models as `folder`/<model>/<run id>/<asset>.json."""

    folder: str
    _run_id: str = PrivateAttr(default="")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Called once a run."""
        self._run_id = context.run.run_id if context.run else ""

    def _path(self, model: str, asset: str) -> Path:
        return Path(self.folder) / model / self._run_id / f"{asset}.json"

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Write the value."""
        if obj is None:  # a job's op
            return
        path = self._path(context.partition_key, context.asset_key.path[-1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(TypeAdapter(type(obj)).dump_json(obj, indent=1))

    def load_input(self, context: dg.InputContext) -> Any:
        """Read the value as the type that the stage's argument has. Raises PromotionFailed."""
        asset = context.asset_key.path[-1]
        try:
            data = self._path(context.partition_key, asset).read_bytes()
        except FileNotFoundError:
            raise PromotionFailed(
                f"{asset} has not run in this run, and no stage goes on from another run's. Start "
                f"the whole `promote` job: dagster job execute -m pipelines.definitions -j promote "
                f'--tags \'{{"dagster/partition": "{context.partition_key}"}}\''
            ) from None
        return TypeAdapter(context.dagster_type.typing_type).validate_json(data)
