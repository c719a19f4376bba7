"""Sources of records with random access; `registry` lists them by their names in configs."""
