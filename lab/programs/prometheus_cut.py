"""Prometheus without the OpenAPI description of its own API.

That page (`/api/v1/openapi.yaml`) and a test helper that is compiled in by mistake
(`web/api/v1/test_helpers.go`) bring two large libraries with them: two thirds of the time that
compiling Prometheus takes. Nothing of what a promotion asks Prometheus for changes.
"""

import shutil
from pathlib import Path

from lab.programs.errors import SetupError

_API = Path("web/api/v1")
_LEFT_OUT = {
    _API / "test_helpers.go",
    *(_API / f"openapi_{part}.go" for part in ("examples", "helpers", "paths", "schemas")),
}
_OPENAPI = """\
// In place of the file of this name: the lab leaves the OpenAPI page out.

package v1

import (
	"log/slog"
	"net/http"
)

type OpenAPIOptions struct {
	IncludePaths []string
	ExternalURL  string
	Version      string
}

type OpenAPIBuilder struct{}

func NewOpenAPIBuilder(OpenAPIOptions, *slog.Logger) *OpenAPIBuilder { return &OpenAPIBuilder{} }

func (*OpenAPIBuilder) WrapHandler(next http.HandlerFunc) http.HandlerFunc { return next }

func (*OpenAPIBuilder) ServeOpenAPI(w http.ResponseWriter, _ *http.Request) {
	http.Error(w, "left out of the lab's Prometheus", http.StatusNotFound)
}
"""


def cut(module: Path, target: Path) -> None:
    """Copy Prometheus's sources from the folder `module` to `target` (made anew), without OpenAPI.

    Raises SetupError naming a file that isn't where it was in the version this was written for.
    """
    shutil.rmtree(target, ignore_errors=True)
    for path in (*_LEFT_OUT, _API / "openapi.go"):
        if not (module / path).is_file():
            raise SetupError(
                f"this Prometheus has no {path}. lab/programs/prometheus_cut.py was written for "
                "another version of Prometheus: adapt it."
            )
    for source in sorted(module.rglob("*.go")):
        path = source.relative_to(module)
        if path.name.endswith("_test.go") or path in _LEFT_OUT or "testhelpers" in path.parts:
            continue
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        text = _OPENAPI if path == _API / "openapi.go" else source.read_text(encoding="utf-8")
        (target / path).write_text(text, encoding="utf-8")
    (target / "go.mod").write_text("module github.com/prometheus/prometheus\n\ngo 1.26.0\n")
