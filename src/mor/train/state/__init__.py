"""What lies on disk while a run goes on: the run folder, checkpoints, branches."""
