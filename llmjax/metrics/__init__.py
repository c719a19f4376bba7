"""Task metrics, baselines, and sums of metrics."""
