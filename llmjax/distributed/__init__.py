"""The device mesh and the processes of a run."""
