"""What a run will cost: steps and tokens, FLOPs, memory, time."""
