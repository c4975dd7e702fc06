"""Prompting, tuning, DPO and PPO, side by side on the user's own tasks."""
