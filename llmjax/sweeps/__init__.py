"""Sweeps over configs.

In the order of their use: `trials` (the algebra of sweep files), `command` (load and run a sweep), `preflight` and
`trial_checks` (check all trials before any starts), `job` (the state of a trial), `launchers`, `process_pool` and
`slurm_queue` (run the trials), `live_table` (show them), `results`, `figure` and `report` (their outcome).
"""
