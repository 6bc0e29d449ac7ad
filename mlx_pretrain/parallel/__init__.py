"""Clusters, meshes, sharding rules, and what a compiled program does on each device."""
