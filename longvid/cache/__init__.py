"""Caches: steps whose velocity is forecast instead of computed."""
