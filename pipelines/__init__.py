"""Wiring only: jobs, schedule, sensor, and the definitions that Dagster loads."""
