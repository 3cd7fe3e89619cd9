"""Meshes, launching and collectives."""
