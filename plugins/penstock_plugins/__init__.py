"""Bundled plugins: the product, built on the public hooks alone."""
