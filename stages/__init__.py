"""The stages: one file each, meeting through run directories and datasets on disk."""
