"""Pure tensor functions: norm, rotary positions, attention, compaction."""
