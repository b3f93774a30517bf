"""Before and around a job on a cluster."""
