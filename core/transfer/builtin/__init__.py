"""Built-in heads, tasks, fusion and trackers, registered as plugins."""
