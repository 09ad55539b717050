"""From a manifest to a trained adapter: frozen features once, then only the adapter's own weights."""
