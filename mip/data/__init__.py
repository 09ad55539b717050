"""From images on disk to a manifest of training samples."""
