"""The guard against over-optimisation: what it watches in a PPO run, its rules and its actions; Gao 2022 forms."""
