"""The program in the download Job: resolve, plan, fetch, verify and publish a model's weights.

No Kubernetes and no Dagster here: it runs on a terminal just as well (`python -m weights`).
"""

import os

# huggingface_hub reads these when it is imported, so they are set before any module here does it.
# Shared blobs are links out of the folder, which a volume that others mount can't follow; the
# rest is chatter that a Job on a closed network would only wait for.
os.environ.setdefault("HF_HUB_DISABLE_SHARED_BLOBS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
