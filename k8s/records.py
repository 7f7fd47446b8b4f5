"""The record of what is live, of what was live before it, and of what is about to be: a ConfigMap
a model. The slot's Deployment has its digest.
"""

import hashlib
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from catalog import ClusterSpec, ModelSpec
from catalog.spec import STORED
from k8s.client import Client
from k8s.errors import UnreadableRecord
from k8s.manifests import Thresholds
from k8s.manifests.release import RECORD, Release, ServedAdapter, Slot, labels, slot_name

FORMAT = 1
PREFIX = "promotion-record-"
Key: TypeAlias = Literal["current", "previous", "next"]
KEYS: tuple[Key, ...] = ("current", "previous", "next")
# Fields of a model that say how it is fetched, tested and scaled, and not what users get of it.
NOT_SERVED: dict[str, bool | set[str]] = {
    **dict.fromkeys(("revision", "weights", "adapters", "smoke", "chat"), True),
    **dict.fromkeys(("traffic", "slo", "scaling", "rollout"), True),
    "gpus": {"products", "min_memory_mib"},
}
# Not the rollout's: an apply of the Deployment must not take the digest away.
MANAGER = "vllm-promotion-records"


class PromotionRecord(BaseModel):
    """Everything that a live model came from. The previous one is what a rollback restores.

    Written by one version of this program and read by others: what a version doesn't know it
    ignores (also in `spec`, which is closed in a catalog file), and a field that is new needs a
    default. `format` is raised when that isn't enough.
    """

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    promotion: str
    cluster: str
    slot: Slot
    at: str  # UTC, ISO 8601
    revision: str
    commit: str
    manifest_digest: str
    weights_bytes: int
    adapters: tuple[ServedAdapter, ...] = ()
    spec: ModelSpec  # as the catalog had it
    image_digest: str  # as the Pod ran it
    template_hash: str
    startup_seconds: int  # the budget
    seconds_to_ready: float  # the cold start as measured
    node: str
    gpus: list[dict[str, Any]]  # k8s.gpus.Gpu
    smoke: str  # one line
    benchmark: dict[str, Any]  # verdict, reason, capacity, in flight, SLO numbers
    thresholds: Thresholds
    trigger: str  # one line
    strategy: str
    simulated: list[str]
    versions: dict[str, str] = {}

    def release(
        self, cluster: ClusterSpec, *, slot: Slot | None = None, promotion: str | None = None
    ) -> Release:
        """What was promoted, to be rolled out or compared once more, elsewhere if so asked."""
        return Release(
            self.spec,
            cluster,
            self.commit,
            slot or self.slot,
            promotion or self.promotion,
            self.startup_seconds,
            self.adapters,
        )

    def weights(self) -> set[tuple[str, str]]:
        """(repository, commit) of all that it needs on the volume."""
        adapters = {(adapter.repo, adapter.commit) for adapter in self.adapters}
        return {(self.spec.repo, self.commit), *adapters}

    def serves_as(self, other: "PromotionRecord") -> bool:
        """Whether users get the same of both: commits, and all that the engine is started with."""
        return self._served() == other._served()

    def _served(self) -> tuple[object, ...]:
        adapters = [(adapter.name, adapter.repo, adapter.commit) for adapter in self.adapters]
        return self.commit, adapters, self.spec.model_dump(exclude=NOT_SERVED)


def name(model: ModelSpec) -> str:
    """Of the ConfigMap."""
    return PREFIX + model.object_name


def read(client: Client, model: ModelSpec) -> tuple[PromotionRecord | None, PromotionRecord | None]:
    """(current, previous). Raises UnreadableRecord for a record that can't be read."""
    data = _stored(client, model)
    return _parse(name(model), data, "current"), _parse(name(model), data, "previous")


def _stored(client: Client, model: ModelSpec) -> dict[str, str]:
    config = client.find("ConfigMap", name(model))
    return dict((config or {}).get("data") or {})


def _parse(config: str, data: dict[str, str], key: str) -> PromotionRecord | None:
    if key not in data:
        return None
    try:
        written = _Format.model_validate_json(data[key]).format
        if written > FORMAT:
            raise UnreadableRecord(
                f"ConfigMap {config}, key {key}: has format {written}, this version reads "
                f"{FORMAT}. Use the version that wrote it, or a newer one"
            )
        return PromotionRecord.model_validate_json(data[key], extra="ignore", context=STORED)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "JSON"
        raise UnreadableRecord(
            f"ConfigMap {config}, key {key}: is no record of this version: {field}: "
            f"{first['msg']}. Restore it, or remove the key: then there is nothing to roll back to"
        ) from None


class _Format(BaseModel):
    format: int = FORMAT


def everything(client: Client) -> list[tuple[Key, PromotionRecord]]:
    """All records of the namespace, also of models that the catalog no longer has.

    Raises UnreadableRecord if any of them can't be read.
    """
    found = []
    for config in client.list("ConfigMap"):
        named = config["metadata"]["name"]
        if named.startswith(PREFIX):
            for key in KEYS:
                if record := _parse(named, config.get("data") or {}, key):
                    found.append((key, record))
    return found


def announce(client: Client, record: PromotionRecord) -> None:
    """Write down, before users are moved, what will then be live: a run that is killed meanwhile
    leaves enough to tell. Hold the model's Lease.
    """
    read(client, record.spec)  # else users would move, and the record couldn't be written
    _apply(client, record.spec, _stored(client, record.spec) | {"next": record.model_dump_json()})


def announced(client: Client, model: ModelSpec) -> PromotionRecord | None:
    """What was announced last and isn't the current record. Users may not have moved to it."""
    return _parse(name(model), _stored(client, model), "next")


def write(client: Client, record: PromotionRecord) -> None:
    """Make `record` the current one; the current one becomes the previous, nothing is announced.

    A promotion of what is live already changes the current one only: the previous one stays what a
    rollback brings back. Hold the model's Lease.
    """
    data = _stored(client, record.spec)
    current = _parse(name(record.spec), data, "current")
    if current is not None and not current.serves_as(record):
        # As it was written: another version may have put more into it than this one knows.
        data["previous"] = data["current"]
    data.pop("next", None)
    _apply(client, record.spec, data | {"current": record.model_dump_json()})


def digest(record: PromotionRecord) -> str:
    """sha256:<hex> of the record, byte for byte as it stands in the ConfigMap."""
    return "sha256:" + hashlib.sha256(record.model_dump_json().encode()).hexdigest()


def stamp(client: Client, record: PromotionRecord) -> None:
    """Note the record's digest on the Deployment of its slot. Raises NotFound."""
    note = {"metadata": {"annotations": {RECORD: digest(record)}}}
    client.patch("Deployment", slot_name(record.spec, record.slot), note, manager=MANAGER)


def _apply(client: Client, model: ModelSpec, data: dict[str, str]) -> None:
    client.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name(model),
                "namespace": client.namespace,
                "labels": labels("record", model),
            },
            "data": data,
        },
        # Whoever edited it by hand: the record says what happened, not what one would like.
        force=True,
    )
