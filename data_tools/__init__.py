"""Turns what annotators and datasets provide into the schema."""

import os

# Arrow's own allocator returns freed memory to the system at once and asks for it again: an import then takes a tenth
# more processor time and 25 MB more. Arrow reads the variable once, so this has no effect where pyarrow is loaded.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
