"""KEDA with its Prometheus trigger only.

KEDA's operator links the client libraries of some seventy systems (Kafka, AWS, Azure, GCP, …), and
they are nine tenths of what has to be downloaded and compiled. A promotion scales on one trigger,
`prometheus`. So the lab compiles a copy of KEDA's published sources without the other triggers and
without the cloud providers' secret stores and authentication. What is left is KEDA's own code,
unchanged: controllers, scaling loop, fallback, pausing, metrics adapter, webhooks. Asked for
something that was left out, it answers with an error that says so.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lab.programs.errors import SetupError

TRIGGERS = ("prometheus", "cpu", "memory")
"""The triggers that the lab's KEDA has. cpu and memory are the HPA's own and cost nothing."""

_SCALERS_KEPT = {"scaler.go", "prometheus_scaler.go", "cpu_memory_scaler.go"}
_SCALER_PACKAGES_KEPT = {"authentication", "scalersconfig"}
_FOLDERS = ("apis", "cmd", "controllers", "pkg", "version")
_SECRET_STORES = {
    "HashiCorpVault": "hashicorpvault_handler.go",
    "AzureKeyVault": "azure_keyvault_handler.go",
    "GCPSecretManager": "gcp_secretmanager_handler.go",
    "AwsSecretManager": "aws_secretmanager_handler.go",
}
_OTHERS_LEFT_OUT = {"azure_event_grid_topic_handler.go", "ginkgo_reporter.go"}
_COMMANDS = {  # each program needs a name of its own
    Path("cmd/operator/main.go"): Path("cmd/keda-operator/main.go"),
    Path("cmd/adapter/main.go"): Path("cmd/keda-adapter/main.go"),
    Path("cmd/webhooks/main.go"): Path("cmd/keda-webhooks/main.go"),
}
_LEFT_OUT = "was left out of the lab's KEDA, which has the Prometheus trigger only"


def cut(module: Path, target: Path) -> None:
    """Copy KEDA's sources from the folder `module` to `target` (made anew), Prometheus only.

    Raises SetupError naming the file if the sources aren't those that this cut was written for.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for folder in _FOLDERS:
        for source in sorted((module / folder).rglob("*.go")):
            path = source.relative_to(module)
            copy = target / _COMMANDS.get(path, path)
            if _wanted(path):
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    # Versions of what it needs are pinned in our go.mod; its own would ask for newer ones.
    (target / "go.mod").write_text("module github.com/kedacore/keda/v2\n\ngo 1.26.0\n")

    _edit(target / "pkg/scaling/scalers_builder.go", _only_these_triggers)
    _edit(target / "pkg/scaling/resolver/scale_resolvers.go", _no_secret_stores)
    _edit(target / "pkg/scalers/scaler.go", _no_kafka_metrics)
    _edit(target / "pkg/scalers/prometheus_scaler.go", _no_cloud_transports)
    _edit(target / "pkg/scalers/authentication/authentication_helpers.go", _no_fasthttp)
    _edit(target / "pkg/eventemitter/eventemitter.go", _no_event_grid)


def _wanted(path: Path) -> bool:
    parts = path.parts
    if path.name.endswith("_test.go") or parts[:2] == ("pkg", "mock"):
        return False
    if parts[:2] == ("pkg", "scalers"):
        return parts[2] in _SCALERS_KEPT | _SCALER_PACKAGES_KEPT
    return path.name not in {*_SECRET_STORES.values(), *_OTHERS_LEFT_OUT}


def _only_these_triggers(text: str) -> str:
    cases = re.findall(r'\tcase "([\w-]+)":\n\t\treturn .*\n', text)
    missing = set(TRIGGERS) - set(cases)
    if missing:
        raise ValueError(f"no case for the trigger {sorted(missing)}")
    for trigger in set(cases) - set(TRIGGERS):
        text = _once(rf'\tcase "{trigger}":\n\t\treturn .*\n', "", text)
    return _once(
        r'fmt.Errorf\("no scaler found for type: %s", triggerType\)',
        f'fmt.Errorf("the trigger %s {_LEFT_OUT}", triggerType)',
        text,
    )


def _no_secret_stores(text: str) -> str:
    for store in _SECRET_STORES:
        text = _once(
            rf"(?ms)^(\t\t\tif triggerAuthSpec\.{store} != nil [^\n]*\n).*?^\t\t\t\}}\n",
            rf'\1\t\t\t\treturn nil, podIdentity, fmt.Errorf("{store} {_LEFT_OUT}")\n\t\t\t}}\n',
            text,
        )
    return text


def _no_kafka_metrics(text: str) -> str:
    text = _once(r'\tmetrics "github.com/rcrowley/go-metrics"\n', "", text)
    constant = 'const externalMetricType = "External" // lies with an Azure trigger otherwise\n'
    return _once(r"(?ms)^func init\(\) \{\n.*?^\}\n", constant, text)


def _no_cloud_transports(text: str) -> str:
    for cloud in ("aws", "azure", "gcp"):
        text = _once(rf'\t"github.com/kedacore/keda/v2/pkg/scalers/{cloud}"\n', "", text)
    text = _once(r"(?ms)^\t\} else \{\n\t\t// could be the case of azure.*?^\t\}\n", "\t}\n", text)
    return text if "errors." in text else _once(r'\t"errors"\n', "", text)


def _no_fasthttp(text: str) -> str:
    text = _once(r'\tlibs "github.com/dysnix/[^\n]*\n\t"github.com/dysnix/[^\n]*\n', "", text)
    text = _once(r'\tpConfig "github.com/prometheus/common/config"\n', "", text)
    return _once(
        r"(?ms)^(\tcase FastHTTP:\n).*?^\t\}\n",
        rf'\1\t\treturn nil, fmt.Errorf("the FastHTTP transport {_LEFT_OUT}")\n\t}}\n',
        text,
    )


def _no_event_grid(text: str) -> str:
    return _once(
        r"(?ms)^(\tif spec\.Destination\.AzureEventGridTopic != nil \{\n)"
        r"\t\teventHandler, err.*?^\t\}\n",
        rf'\1\t\te.log.Info("AzureEventGridTopic {_LEFT_OUT}", '
        r'"identity", podIdentity.Provider, "parameters", len(authParams))\n\t\treturn\n\t}\n',
        text,
    )


def _once(pattern: str, replacement: str, text: str) -> str:
    """Replace the one match of `pattern`; ValueError if there is none or more than one."""
    changed, count = re.subn(pattern, replacement, text)
    if count != 1:
        raise ValueError(f"{count} places match {pattern!r}, wanted one")
    return changed


def _edit(path: Path, change: Callable[[str], str]) -> None:
    try:
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SetupError(
            f"KEDA's {path.name} can't be cut down to the Prometheus trigger: {error}. "
            "lab/programs/keda_cut.py was written for another version of KEDA: adapt it."
        ) from None
