"""Many films: job files, a table of jobs that outlives every process, workers that keep their weights, a report."""
