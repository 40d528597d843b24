"""Looking at models and runs: parameters and memory from a config, routing statistics from a run."""
