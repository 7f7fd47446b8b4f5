"""What can go wrong with Kubernetes. Each message says what, which object, and what to do next."""


class KubernetesError(Exception):
    """Base of all errors of k8s/. `code` is the HTTP status, 0 where there was none."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(KubernetesError):
    """No usable kubeconfig or in-cluster account, or the context asked for isn't in it, or what
    answers at its address is no API server."""


class Unreachable(KubernetesError):
    """The API server can't be reached, or answers 429/5xx for longer than it was given.

    `sent`: the request may have been carried out. `retry_after_s`: what the server asks for.
    """

    def __init__(
        self, message: str, *, code: int = 0, sent: bool = True, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message, code=code)
        self.sent = sent
        self.retry_after_s = retry_after_s


class Unauthorized(KubernetesError):
    """The API server doesn't accept our credentials (401), not even after reading them again."""


class Forbidden(KubernetesError):
    """403: a missing permission, or an admission rule such as a quota."""


class NotFound(KubernetesError):
    """404: the object, or the namespace that it would go to, doesn't exist."""


class MissingKind(KubernetesError):
    """404 for a whole kind: the CRD isn't installed."""


class Conflict(KubernetesError):
    """409: changed by someone else meanwhile, or (server-side apply) fields owned by others.

    `fields` maps each such field to its manager, e.g. {".spec.replicas": "keda-operator"}.
    """

    def __init__(self, message: str, *, fields: dict[str, str] | None = None) -> None:
        super().__init__(message, code=409)
        self.fields = fields or {}


class AlreadyExists(Conflict):
    """409 to a create: the name is taken."""


class Invalid(KubernetesError):
    """400 or 422: the API server refuses the object; the message names the fields."""


class UnreadableRecord(KubernetesError):
    """What was written down of a promotion isn't of this version, or was edited by hand."""


class WaitTimeout(KubernetesError):
    """A deadline passed. `last_state` is what was seen last."""

    def __init__(self, message: str, *, last_state: str) -> None:
        super().__init__(message)
        self.last_state = last_state


class ConditionFailed(KubernetesError):
    """What was waited for can't come any more: ImagePullBackOff, CrashLoopBackOff, …"""


class JobFailed(KubernetesError):
    """A Job didn't do its work. `error` is the program's own name of it, e.g. "GatedRepo"."""

    def __init__(self, message: str, *, error: str = "") -> None:
        super().__init__(message)
        self.error = error


class LeaseHeld(KubernetesError):
    """Someone else holds the Lease. `holder` is who."""

    def __init__(self, message: str, *, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class LeaseLost(KubernetesError):
    """We held the Lease, and now someone else does, or it could not be renewed in time."""


class PodUnreachable(KubernetesError):
    """A Pod's port can't be reached by port-forward, or doesn't answer in time.

    `cut`: the connection broke off, so the same request may well be answered the next time.
    """

    def __init__(self, message: str, *, code: int = 0, cut: bool = False) -> None:
        super().__init__(message, code=code)
        self.cut = cut


class HttpStatus(KubernetesError):
    """A Pod's HTTP server answered with an error status: `code`, and its text in `body`."""

    def __init__(self, message: str, *, code: int, body: str) -> None:
        super().__init__(message, code=code)
        self.body = body
