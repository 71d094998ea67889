"""The recipes: one class per job, which puts tables together. No key has its default here but `run.name`."""
