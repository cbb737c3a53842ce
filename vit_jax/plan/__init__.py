"""What a run will need of accelerators that are not here: memory, time and money."""
