"""The commands of `rlhf data`: options only; the modules that they call do the work."""
