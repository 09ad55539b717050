"""Thin Prefect tasks: one call into mip, paths in, a path out. DVC decides what is up to date; nothing is cached."""
