"""Where keys and values live during attention: in rows, in segments, in a cache."""
