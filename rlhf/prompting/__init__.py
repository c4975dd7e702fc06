"""Ways to put a model to work without training: instructions, examples, label words, chains of thought."""
