"""The running interpreter's standard library as a dataset with configs for several tasks; see `builder`."""
