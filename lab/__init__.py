"""A real one-node Kubernetes on one machine, and what a promotion meets there."""
