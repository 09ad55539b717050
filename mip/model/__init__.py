"""The adapter, the attention it adds, and the pipeline; see DESIGN.md, "The model"."""
