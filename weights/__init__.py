"""The program in the download Job: resolve, plan, fetch, verify and publish a model's weights.

No Kubernetes and no Dagster here: it runs on a terminal just as well (`python -m weights`).
"""

import os
from urllib.parse import urlsplit

# huggingface_hub takes it apart when it is imported, and fails there.
try:
    urlsplit(os.environ.get("HF_ENDPOINT", "")).port  # noqa: B018  # raises
except ValueError:
    raise SystemExit(f"HF_ENDPOINT is {os.environ['HF_ENDPOINT']!r}: its port is none") from None
# huggingface_hub and hf_xet read these when they are imported, so they are set before any module
# here does it.
# Shared blobs are links out of the folder, which a volume that others mount can't follow; the
# rest is chatter that a Job on a closed network would only wait for.
os.environ.setdefault("HF_HUB_DISABLE_SHARED_BLOBS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Parts of files that Xet's client holds in memory: two whole ones of 64 MiB, or more small ones.
# With that the program stays below 300 MB; hf_xet's own choice is a share of the machine's memory.
# More is faster where one stream doesn't fill the network (k8s/manifests/jobs.py).
os.environ.setdefault("HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE", "160mb")
os.environ.setdefault("HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT", "160mb")
# A silent connection is opened anew well before the watchdog (weights.pace) gives the fetch up;
# a fetch that is started again has lost what it had of the file.
os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", "30s")
# It tries a request six times with up to so long between them: then the fetch says what is wrong,
# before its watchdog does.
os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "20s")
