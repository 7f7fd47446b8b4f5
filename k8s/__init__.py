"""Everything Kubernetes: client, waits, logs, Jobs, Leases, rendered objects. No Dagster."""
