"""What turns the data people have into the schema."""
