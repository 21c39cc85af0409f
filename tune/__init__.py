"""Many recipes at once, on Ray."""
