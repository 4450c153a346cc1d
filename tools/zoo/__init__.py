"""The model zoo: runs of configs, what they have measured, and the tables made from it."""
