"""Reports of runs: figures, HTML pages, and text."""
