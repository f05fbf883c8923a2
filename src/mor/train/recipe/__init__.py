"""What a run is asked to do: the recipe, its sections, its file."""
