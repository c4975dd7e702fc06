"""The commands of `rlhf data`: options only; what they do lies in the modules that they call."""
