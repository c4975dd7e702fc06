"""New instructions from seed tasks, as a teacher writes them (Self-Instruct)."""
