"""Ways to put a model to work, side by side on the user's own tasks."""
