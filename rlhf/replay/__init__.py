"""Whole PPO updates as they were: recorded, read back, and recomputed."""
