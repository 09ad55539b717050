"""Benchmarks, generation by every method, metrics, and the measures that see confusion; see DESIGN.md."""
