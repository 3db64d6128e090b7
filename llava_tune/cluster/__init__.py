"""The cluster: a run as a chain of Slurm jobs, nodes looked at before training, and why a run failed."""
