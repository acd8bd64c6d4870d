"""Engines of others that serve what was trained here; each needs its engine, and is imported only when asked for."""
