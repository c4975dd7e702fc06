"""Judges: models on servers that compare or rate answers, and their measured agreement with human rankings."""
