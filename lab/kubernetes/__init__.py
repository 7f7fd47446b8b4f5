"""The one-node Kubernetes of the lab: its sandbox, its components, its add-ons."""
